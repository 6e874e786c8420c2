"""Writing Hugging Face directories: import then export gives the same bytes, and a directory appears whole or not."""

import errno
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import CONFIGS, FAMILY_CONFIGS, random_decoder, to_tensors

import sft_jax
from sft_jax.errors import UserError
from sft_jax.hf import save as save_module
from sft_jax.hf import writer
from sft_jax.hf.files import INDEX_FILE, SINGLE_FILE, open_tensors
from sft_jax.hf.load import load, load_decoder
from sft_jax.hf.save import generation_config, save
from sft_jax.hf.source import Provenance, Source
from sft_jax.hf.writer import TensorSpec, plan_shards, write_order
from sft_jax.model.options import Options
from sft_jax.model.sharding import make_mesh


def source(config: dict | None = None, generation: dict | None = None) -> Source:
    text = json.dumps(config or CONFIGS["llama"])
    return Source("some/base", text, None if generation is None else json.dumps(generation))


@pytest.fixture(scope="module")
def decoder():
    decoder = jax.tree.map(jnp.asarray, random_decoder("llama"))
    decoder.source = source()
    return decoder


def tensors_of(folder) -> dict[str, tuple]:
    tensors = open_tensors(folder)
    return {name: (info.dtype, info.shape, tensors.read(name).tobytes()) for name, info in tensors.tensors.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_the_same_bytes(name, hf_folder, tmp_path):
    folder = hf_folder(name)
    save(load(folder)[0], None, tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(folder)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert before == after


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_the_same_bytes_in_bfloat16_and_in_shards(name, hf_folder, tmp_path):
    folder = hf_folder(name, "bfloat16", "20KB")
    save(load(folder)[0], None, tmp_path / "out", max_shard_size=20_000)
    assert tensors_of(tmp_path / "out") == tensors_of(folder)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    reference = json.loads((folder / INDEX_FILE).read_text())
    assert index["weight_map"].keys() == reference["weight_map"].keys()
    assert index["metadata"]["total_size"] == reference["metadata"]["total_size"]
    shards = set(index["weight_map"].values())
    assert len(shards) > 2 and shards == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    for shard in shards:
        assert (tmp_path / "out" / shard).stat().st_size < 25_000


def test_the_same_bytes_from_every_mesh(hf_folder, tmp_path):
    folder = hf_folder("gemma2")
    save(load_decoder(folder, Options(), make_mesh(1, 4, 2)), None, tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(folder)


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_transformers_reads_it_with_the_same_logits(name, hf_folder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, _ = load(hf_folder(name))
    save(model, None, tmp_path / "out", max_shard_size=20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(0, 96, (2, 24)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, tokens), expected, atol=1e-4, rtol=0)


def test_the_reference_library_reads_it(decoder, tmp_path):
    save(decoder, None, tmp_path / "out")
    read = safetensors.numpy.load_file(tmp_path / "out" / SINGLE_FILE)
    expected = to_tensors(decoder, decoder, CONFIGS["llama"])
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value)
    with safetensors.safe_open(tmp_path / "out" / SINGLE_FILE, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_dtype_asked_for(decoder, tmp_path):
    save(decoder, None, tmp_path / "out", dtype="bfloat16")
    expected = to_tensors(decoder, decoder, CONFIGS["llama"])
    for name, (dtype, shape, data) in tensors_of(tmp_path / "out").items():
        assert dtype == ml_dtypes.bfloat16
        assert data == expected[name].astype(ml_dtypes.bfloat16).tobytes() and shape == expected[name].shape
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(UserError, match="dtype: must be one of .*, not 'int4'"):
        save(decoder, None, tmp_path / "other", dtype="int4")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16", "dtype": "float16"}, {"torch_dtype": "float32", "dtype": "float32"}),
    ],
)
def test_config_is_carried_along_with_the_dtype_of_the_tensors(given, expected, decoder, tmp_path):
    decoder = jax.tree.map(lambda x: x, decoder)
    config = {**CONFIGS["llama"], "a_key_of_its_own": [1, {"b": None}]}
    decoder.source = source({**config, **given})
    save(decoder, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, **expected}


# ---- generation_config.json


class Eos:
    eos_id = 7


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "stop_ids", "expected"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1}, None, None, (), {"bos_token_id": 1, "eos_token_id": 2}),
        ({"eos_token_id": 2}, None, Eos, (9,), {"eos_token_id": [2, 9]}),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 4], "k": 1}, Eos, (9, 3), {"eos_token_id": [3, 4, 9], "k": 1}),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 4]}, Eos, (), {"eos_token_id": [3, 4]}),
        ({"eos_token_id": 2}, {"eos_token_id": [3]}, None, (), {"eos_token_id": [3]}),
        ({"eos_token_id": [5, 6]}, {"top_k": 1}, None, (6,), {"top_k": 1, "eos_token_id": [5, 6]}),
        ({}, None, Eos, (), {"eos_token_id": 7}),
        ({}, None, Eos, (9,), {"eos_token_id": 9}),
        ({}, None, None, (), {}),
        ({"eos_token_id": 0}, None, Eos, (0,), {"eos_token_id": 0}),
    ],
)  # fmt: skip
def test_stop_ids_are_added_and_never_replaced(config, generation, tokenizer, stop_ids, expected):
    assert generation_config(source(config or {"a": 1}, generation), tokenizer, stop_ids) == expected


# ---- README, public names


def test_the_readme_names_base_and_data(decoder, tmp_path):
    save(decoder, None, tmp_path / "out", provenance=Provenance("some/base", "abc123", 1200))
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "base_model: some/base\n",
        "`some/base`",
        "`abc123`",
        "1,200",
        "31,712 in float32",
    ):
        assert part in text, part


def test_a_local_base_is_not_taken_for_a_hub_id(hf_folder, tmp_path):
    save(load(hf_folder("llama"))[0], None, tmp_path / "out")
    assert "base_model:" not in (tmp_path / "out" / "README.md").read_text()


def test_public_names_with_a_real_model(assets, tmp_path):
    model, tokenizer = sft_jax.load(assets / "models" / "stories260k")
    sft_jax.save(model, tokenizer, tmp_path / "out")
    again, same = sft_jax.load(tmp_path / "out")
    text = "Once upon a time, there was <s> naïve"
    assert same.encode(text) == tokenizer.encode(text)
    assert tensors_of(tmp_path / "out") == tensors_of(assets / "models" / "stories260k")
    assert again.spec == model.spec


def test_a_model_without_a_source(tmp_path):
    decoder = jax.tree.map(lambda x: x, random_decoder("llama"))
    decoder.source = None
    with pytest.raises(UserError, match="save a model that `load` or `fit` returned"):
        save(decoder, None, tmp_path / "out")


# ---- all or nothing


def left(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_place_that_is_taken(decoder, tmp_path):
    out = tmp_path / "out"
    save(decoder, None, out)
    (out / "note").write_text("")
    with pytest.raises(UserError, match="out: is there already; name another place, or ask to overwrite it"):
        save(decoder, None, out)
    assert (out / "note").exists()
    save(decoder, None, out, overwrite=True)
    assert not (out / "note").exists() and left(tmp_path) == {"out"}


def test_only_a_model_is_overwritten(decoder, tmp_path):
    (tmp_path / "thesis").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("")
    for place in ("thesis", "folder"):
        with pytest.raises(UserError, match="is no exported model, so it is not overwritten"):
            save(decoder, None, tmp_path / place, overwrite=True)
    assert (tmp_path / "folder" / "thesis").exists() and left(tmp_path) == {"thesis", "folder"}


def test_an_empty_folder_is_filled(decoder, tmp_path):
    (tmp_path / "out").mkdir()
    save(decoder, None, tmp_path / "out")
    assert left(tmp_path) == {"out"} and (tmp_path / "out" / SINGLE_FILE).exists()


def test_a_check_that_refuses_leaves_nothing_new(decoder, tmp_path):
    save(decoder, None, tmp_path / "out")
    before = (tmp_path / "out").stat().st_ino

    def refuse(folder):
        assert (folder / SINGLE_FILE).exists() and (folder / "config.json").exists()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        save(decoder, None, tmp_path / "out", overwrite=True, check=refuse)
    assert left(tmp_path) == {"out"} and (tmp_path / "out").stat().st_ino == before


def test_what_a_killed_export_left_is_removed(decoder, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("")
    save(decoder, None, tmp_path / "out")
    assert left(tmp_path) == {"out"} and not (tmp_path / "out" / "half").exists()


def test_a_disk_that_fills_up(decoder, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(UserError, match="out: the disk is full .No space left on device.; free some space"):
        save(decoder, None, tmp_path / "out")
    assert left(tmp_path) == set()


def test_a_disk_that_is_too_small(decoder, tmp_path, monkeypatch):
    usage = writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda place: usage._replace(free=100_000))
    with pytest.raises(UserError, match="the disk is full .0.00 GB are needed and 0.00 GB are free"):
        save(decoder, None, tmp_path / "out")
    assert left(tmp_path) == set()


def test_a_place_that_cannot_be_written(decoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        save(decoder, None, tmp_path / "file" / "out")


# ---- shards


def specs(*sizes):
    return [TensorSpec(f"t{i}", np.dtype(np.uint8), (size,)) for i, size in enumerate(sizes)]


def test_plan_shards():
    plan = plan_shards(specs(4, 4, 4, 20, 1, 1), 10)
    assert {file: [spec.name for spec in shard] for file, shard in plan.items()} == {
        "model-00001-of-00004.safetensors": ["t0", "t1"],
        "model-00002-of-00004.safetensors": ["t2"],
        "model-00003-of-00004.safetensors": ["t3"],
        "model-00004-of-00004.safetensors": ["t4", "t5"],
    }
    assert list(plan_shards(specs(4, 6), 10)) == [SINGLE_FILE]


def test_tensors_are_aligned_to_their_dtype(tmp_path):
    mixed = [TensorSpec("a", np.dtype(np.uint8), (3,)), TensorSpec("b", np.dtype(np.float32), (2,))]
    values = {"a": np.arange(3, dtype=np.uint8), "b": np.ones(2, np.float32)}
    fetched = []
    writer.write_tensors(tmp_path, mixed, lambda name: (fetched.append(name), values[name])[1])
    assert fetched == write_order(mixed, 10**9) == ["b", "a"]
    for name, info in open_tensors(tmp_path).tensors.items():
        assert info.start % info.dtype.itemsize == 0
        assert open_tensors(tmp_path).read(name).tobytes() == values[name].tobytes()


def test_layers_stay_together(decoder):
    names = [spec.name for spec in save_module.Tensors(decoder).specs]
    layers = [name.split(".")[2] for name in names if ".layers." in name]
    assert layers == sorted(layers, key=int)
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
