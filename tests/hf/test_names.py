"""Where in a checkpoint the decoder is, and what of it is carried along to an export."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import CONFIGS, random_decoder, to_tensors

from sft_jax.errors import UserError
from sft_jax.hf import names
from sft_jax.hf.export import export_checkpoint
from sft_jax.hf.files import SINGLE_FILE, open_tensors
from sft_jax.hf.load import load, load_decoder
from sft_jax.hf.names import NAMES
from sft_jax.hf.names.parts import body
from sft_jax.hf.names.table import NameTable, Root
from sft_jax.hf.save import save
from sft_jax.hf.source import find_model, read_source
from sft_jax.hf.verify import ExportMismatch, verify_export
from sft_jax.model import families
from sft_jax.model.families import FAMILIES
from sft_jax.model.options import Options

WRAPPED = "WrappedForConditionalGeneration"  # a language model inside of another one, under either of two names
CONFIG = {**CONFIGS["llama"], "architectures": [WRAPPED], "dtype": "float32"}
ROOTS = (Root("model.text.", "lm_head.weight"), Root("text.model.", "text.lm_head.weight"))
CARRIED = {
    "vision.patch.weight": np.arange(60, dtype=np.float32).reshape(4, 3, 5),
    "vision.layers.0.bias": np.arange(7).astype(ml_dtypes.bfloat16),
    "vision.count": np.array(3, np.int64),
    "model.layers.3.extra": np.arange(4, dtype=np.float16),  # beyond the last layer, 2
}


@pytest.fixture(autouse=True)
def wrapped(monkeypatch):
    table = NameTable(body(), ROOTS, carried=(r"vision\..*", r"model\.layers\.{layers}\..*"))
    monkeypatch.setitem(NAMES, WRAPPED, table)
    monkeypatch.setitem(FAMILIES, WRAPPED, FAMILIES["LlamaForCausalLM"])
    return table


def write(folder, root: Root, carried=CARRIED, config=CONFIG):
    """Writes the tiny Llama under the names of `root`, and the tensors that are not of it."""
    decoder = random_decoder("llama")
    tensors = {
        root.head if name == "lm_head.weight" else root.body + name.removeprefix("model."): np.ascontiguousarray(value)
        for name, value in to_tensors(decoder, decoder, CONFIGS["llama"]).items()
    }
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file({**tensors, **carried}, folder / SINGLE_FILE)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder) -> dict[str, tuple]:
    tensors = open_tensors(folder)
    return {name: (info.dtype, info.shape, tensors.read(name).tobytes()) for name, info in tensors.tensors.items()}


def test_every_family_has_names():
    assert NAMES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": [[]]}, {"architectures": ["Nothing"]}])
def test_an_architecture_without_names(config):
    assert names.name_table(config) is None
    with pytest.raises(UserError, match="architecture"):
        families.spec_from_config(config)


@pytest.mark.parametrize("root", ROOTS)
def test_the_same_names_and_bytes_again(root, tmp_path):
    """The export has the base's names and what is not of the decoder, in shards too; so has the export of an export."""
    base = write(tmp_path / "base", root)
    decoder, _ = load(base)
    np.testing.assert_array_equal(decoder.embed.embedding[...], random_decoder("llama").embed.embedding[...])
    assert decoder.source.root == root.body and decoder.source.ignored == ()
    report = export_checkpoint(decoder, None, tmp_path / "out", max_shard_size=20_000)
    assert report.carried == 4 and "4 tensors beside the language model equal those of the base" in str(report)
    assert tensors_of(tmp_path / "out") == tensors_of(base)
    shutil.rmtree(base)
    save(load(tmp_path / "out")[0], None, tmp_path / "again")
    assert tensors_of(tmp_path / "again") == tensors_of(tmp_path / "out")


def test_what_is_carried_keeps_its_dtype(tmp_path):
    base = write(tmp_path / "base", ROOTS[0], config={**CONFIG, "text_config": {"torch_dtype": "float32", "other": 1}})
    export_checkpoint(load(base)[0], None, tmp_path / "out", dtype="bfloat16")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in after:
        assert after[name] == before[name] if name in CARRIED else after[name][0] == ml_dtypes.bfloat16, name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["text_config"] == {"torch_dtype": "bfloat16", "other": 1}
    assert "torch_dtype" not in config


def test_the_names_of_a_checkpoint_without_weights_are_those_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    decoder = load_decoder(tmp_path, Options(), init="random")
    assert decoder.source.root is None
    save(decoder, None, tmp_path / "out")
    assert "model.embed_tokens.weight" in open_tensors(tmp_path / "out").tensors
    assert read_source(tmp_path / "out", "out").root == "model."


def test_a_base_that_is_gone(tmp_path):
    base = write(tmp_path / "base", ROOTS[0])
    decoder, _ = load(base)
    (base / SINGLE_FILE).unlink()
    with pytest.raises(UserError, match=f"{base}: holds tensors that are not of the language model.*holds no weights"):
        save(decoder, None, tmp_path / "out")
    shutil.rmtree(base)
    with pytest.raises(UserError, match=f"{base}: holds tensors that are not of the language model.*no such directory"):
        save(decoder, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_carried_tensor_that_was_written_wrong(tmp_path):
    decoder, _ = load(write(tmp_path / "base", ROOTS[0]))
    save(decoder, None, tmp_path / "out")
    good = safetensors.numpy.load_file(tmp_path / "out" / SINGLE_FILE)
    for changed in (
        {**good, "vision.patch.weight": good["vision.patch.weight"] + (np.arange(5) == 4)},
        {**good, "vision.layers.0.bias": good["vision.layers.0.bias"].astype(np.float16)},
        {name: value for name, value in good.items() if name != "vision.count"},
    ):
        name = next(name for name in good if name not in changed or changed[name].tobytes() != good[name].tobytes())
        safetensors.numpy.save_file(changed, tmp_path / "out" / SINGLE_FILE)
        with pytest.raises(ExportMismatch, match=f"tensor '{name}' is not that of {tmp_path / 'base'}"):
            verify_export(tmp_path / "out", decoder, None, ())


def test_a_run_has_the_names_of_its_base(tmp_path):
    """A state from elsewhere than the base's files, as a checkpoint is, with the source that is read for it."""
    base = write(tmp_path / "base", ROOTS[1])
    decoder = jax.tree.map(lambda x: jnp.asarray(x) * 2, random_decoder("llama"))
    decoder.source = read_source(find_model(base), str(base))
    save(decoder, None, tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert after.keys() == before.keys() and all(after[name] == before[name] for name in CARRIED)
    assert load(tmp_path / "out")[0].source.root == "text.model."


# ---- what is wrong


def test_a_model_saved_without_its_head(tmp_path):
    folder = write(tmp_path / "body", Root("", "gone"), carried={})
    message = "body: names its tensors 'embed_tokens.weight' .* without 'model.text.', .*AutoModel"
    with pytest.raises(UserError, match=message):
        load(folder)
    config = {**CONFIG, "architectures": ["LlamaForCausalLM"]}
    folder = write(tmp_path / "headless", Root("model.", "model.embed_tokens.weight"), carried={}, config=config)
    with pytest.raises(UserError, match="headless: lacks the head, 'lm_head.weight', and config.json does not tie it"):
        load(folder)


def test_a_model_saved_inside_of_another(tmp_path):
    folder = write(tmp_path / "inside", Root("policy.model.", "policy.lm_head.weight"), carried={})
    message = "holds its embedding as 'policy.model.embed_tokens.weight', where 'model.text.embed_tokens.weight' is"
    with pytest.raises(UserError, match=message):
        load(folder)


def test_other_tensors_are_not_carried(tmp_path):
    folder = write(tmp_path / "base", ROOTS[0], carried={**CARRIED, "audio.weight": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="holds 1 tensors that the model has no place for: 'audio.weight'"):
        load(folder)


def test_buffers_below_the_root_are_left_out(tmp_path):
    buffers = {"text.model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert load(write(tmp_path / "base", ROOTS[1], carried=buffers))[0].source.ignored == tuple(buffers)
    with pytest.raises(UserError, match="no place for: 'text.model.layers.1.self_attn.rotary_emb.inv_freq'"):
        load(write(tmp_path / "other", ROOTS[0], carried=buffers))
