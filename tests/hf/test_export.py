"""An export is read back and compared: whatever differs from the live model is found before anybody uses it."""

import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tiny_models import CONFIGS, random_decoder

from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.hf import verify
from sft_jax.hf.export import export_checkpoint
from sft_jax.hf.files import SINGLE_FILE
from sft_jax.hf.save import save
from sft_jax.hf.source import Source
from sft_jax.hf.verify import ExportMismatch, verify_export
from sft_jax.model.sharding import make_mesh, shardings

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
STRICT = "{% if messages[0].content | length < 8 %}{{ raise_exception('too short') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer without merges, with an end-of-sequence token and a template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<|user|>", "<|bot|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def decoder():
    decoder = jax.tree.map(jnp.asarray, random_decoder("llama"))
    decoder.source = Source("some/base", json.dumps({**CONFIGS["llama"], "eos_token_id": 256}), None)
    return decoder


@pytest.fixture(scope="module")
def exported(decoder, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "good"
    report = export_checkpoint(decoder, tokenizer, path, stop_ids=[258])
    return path, report


def test_one_copy_of_the_parameters_at_a_time(decoder, tmp_path, monkeypatch):
    """Beside the live model there is never more than one in the dtype of the export."""
    held, compute = [], verify._logits

    def logits(model, tokens):
        held.append(sum(x.nbytes for x in jax.live_arrays() if x.dtype == jnp.bfloat16))
        return compute(model, tokens)

    monkeypatch.setattr(verify, "_logits", logits)
    gc.collect()
    export_checkpoint(decoder, None, tmp_path / "out", dtype="bfloat16")
    one = 2 * sum(leaf.size for leaf in jax.tree.leaves(decoder))
    assert len(held) == 3 and max(held) - held[0] == one


def test_the_report_of_a_good_export(exported, decoder):
    _, report = exported
    assert report.parameters == sum(leaf.size for leaf in jax.tree.leaves(decoder))
    assert report.logit_difference == 0 and report.rounding_difference == 0
    assert report.prompts == 11 and report.refused_prompts == 0  # 4 plain, 3 added tokens, 4 through the template
    assert report.stop_ids == (256, 258)
    assert str(report).endswith("11 prompts equal, logits within 0.0e+00, stop ids [256, 258]")


def test_an_export_in_another_dtype_is_compared_in_that_dtype(decoder, tmp_path):
    report = export_checkpoint(decoder, None, tmp_path / "out", dtype="bfloat16")
    assert report.logit_difference == 0 and 0 < report.rounding_difference < 1
    assert report.prompts == 0 and "; rounding to the dtype of the export moved logits by up to " in str(report)


def test_an_export_from_a_mesh(decoder, tmp_path):
    mesh = make_mesh(1, 4, 2)
    spread = jax.device_put(decoder, shardings(decoder, mesh))
    assert export_checkpoint(spread, None, tmp_path / "out").logit_difference == 0


def test_conversations_that_the_template_refuses_are_counted(decoder, tokenizer, tmp_path):
    report = export_checkpoint(decoder, tokenizer.with_chat_template(STRICT), tmp_path / "out")
    assert report.refused_prompts == 1 and report.prompts == 10
    assert str(report).endswith("; the chat template refused 1 of 4 sample conversations")
    assert load_tokenizer(tmp_path / "out").chat_template == STRICT


def change_tensor(folder):
    tensors = safetensors.numpy.load_file(folder / SINGLE_FILE)
    tensors["model.layers.2.mlp.up_proj.weight"].view(np.uint32)[3, 4] ^= 1
    safetensors.numpy.save_file(tensors, folder / SINGLE_FILE)


def change_json(file, **values):
    def change(folder):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def change_template(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<|bot|>", "<|bot|> "))


def change_vocabulary(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["H"], vocabulary["W"] = vocabulary["W"], vocabulary["H"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_tensor, r"runs\.0\.0\.mlp\.up\.kernel: 1 of 5376 numbers differ"),
        (change_json("config.json", rms_norm_eps=1e-2), "logits differ from the live model's by"),
        (change_json("config.json", rope_parameters={"rope_theta": 100.0, "rope_type": "default"}), "logits differ"),
        (change_json("generation_config.json", eos_token_id=256), r"generation stops at \[256\], not at \[256, 258\]"),
        (change_json("generation_config.json", eos_token_id=[256, 258, 3]), r"generation stops at \[3, 256, 258\]"),
        (change_template, "the tokenizer's chat_template was written as"),
        (change_json("tokenizer_config.json", eos_token="<|bot|>"), "the tokenizer's eos_id was written as 258"),
        (change_vocabulary, "the tokenizer was written so that 'Hello' has the ids"),
    ],
)
def test_every_difference_is_found(change, message, exported, decoder, tokenizer, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(exported[0], folder)
    change(folder)
    with pytest.raises(ExportMismatch, match=message):
        verify_export(folder, decoder, tokenizer, [258])


def test_logits_that_are_no_numbers_are_found(decoder, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf, decoder)
    broken.final_norm.scale = broken.final_norm.scale.replace(jnp.full(32, jnp.nan))
    with pytest.raises(ExportMismatch, match="logits differ .* by nan of nan"):
        export_checkpoint(broken, None, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_nothing_appears_where_the_export_is_not_the_model(decoder, tokenizer, tmp_path, monkeypatch):
    save(decoder, tokenizer, tmp_path / "out")
    other = tokenizer.with_chat_template(STRICT)
    monkeypatch.setattr(type(tokenizer), "save", lambda self, folder, save=type(tokenizer).save: save(other, folder))
    with pytest.raises(ExportMismatch, match="chat_template was written as"):
        export_checkpoint(decoder, tokenizer, tmp_path / "out", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert load_tokenizer(tmp_path / "out").chat_template == TEMPLATE
