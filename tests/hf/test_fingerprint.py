"""The fingerprint of a model is that of its files: the same wherever and however it is loaded, and of nothing else."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import CONFIGS, random_decoder, to_tensors

from sft_jax.checkpoint.integrity import checksum
from sft_jax.hf.files import SINGLE_FILE
from sft_jax.hf.load import load, load_decoder
from sft_jax.hf.names import NAMES
from sft_jax.hf.names.parts import body
from sft_jax.hf.names.table import NameTable, Root
from sft_jax.hf.save import save
from sft_jax.model.options import Options
from sft_jax.model.sharding import make_mesh


def mixed(x: int) -> int:
    """The finaliser of MurmurHash3, in Python's whole numbers."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def expected_checksum(array: np.ndarray) -> int:
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}").tolist()
    return sum(mixed(bit ^ mixed((i + 0x9E3779B9) % 2**32)) for i, bit in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8])
def test_a_checksum_is_the_sum_over_ranges_of_rows(dtype):
    array = (np.random.default_rng(0).random((7, 3, 5)) * 200).astype(dtype)
    whole = int(checksum(jax.numpy.asarray(array)))
    assert whole == expected_checksum(array)
    for cut in range(8):
        parts = [(array[:cut], 0), (array[cut:], cut * 15)]
        assert sum(int(checksum(jax.numpy.asarray(part), first)) for part, first in parts if part.size) % 2**32 == whole


# ---- of a directory


def write(folder, change=lambda tensors: tensors, config=CONFIGS["llama"]):
    decoder = random_decoder("llama")
    tensors = {name: np.array(x) for name, x in to_tensors(decoder, decoder, CONFIGS["llama"]).items()}
    folder.mkdir()
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in change(tensors).items()}, folder / SINGLE_FILE
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mark(folder, **options) -> str:
    return load_decoder(folder, Options(), **options).source.fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fingerprint") / "model")


def test_it_does_not_depend_on_how_the_model_is_loaded(folder, tmp_path):
    expected = mark(folder)
    assert len(expected) == 64 and set(expected) <= set("0123456789abcdef")
    assert mark(folder, mesh=make_mesh(1, 8, 1)) == mark(folder, mesh=make_mesh(2, 2, 2)) == expected
    assert mark(folder, param_dtype="bfloat16") == expected
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert mark(copy) == expected
    save(load(folder)[0], None, tmp_path / "shards", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2 and mark(tmp_path / "shards") == expected


def test_it_does_not_depend_on_the_prefix_of_the_names(folder, tmp_path, monkeypatch):
    roots = (Root("model.", "lm_head.weight"), Root("inner.", "inner.head"))
    monkeypatch.setitem(NAMES, "LlamaForCausalLM", NameTable(body(), roots))
    names = {"lm_head.weight": "inner.head"}
    other = write(
        tmp_path / "other",
        lambda tensors: {names.get(name, name.replace("model.", "inner.")): x for name, x in tensors.items()},
    )
    assert load(other)[0].source.root == "inner." and mark(other) == mark(folder)


def flipped(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"].view(np.uint32)[3, 5] ^= 1
    return tensors


def swapped(tensors):
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    return tensors


def moved(tensors):
    """Two numbers of one tensor change places."""
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[0, 0], weight[1, 1] = weight[1, 1].copy(), weight[0, 0].copy()
    return tensors


def halved(tensors):
    return {**tensors, "model.norm.weight": tensors["model.norm.weight"].astype(np.float16)}


@pytest.mark.parametrize("change", [flipped, swapped, moved, halved])
def test_any_other_numbers_have_another(change, folder, tmp_path):
    assert mark(write(tmp_path / "changed", change)) != mark(folder)


def test_tensors_that_hold_no_parameter_do_not_count(folder, tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert mark(write(tmp_path / "more", lambda tensors: tensors | extra)) == mark(folder)


def test_equal_models_share_compiled_code(folder, tmp_path):
    """It is not compared, or a function would be compiled again for an abstract decoder's numbers."""
    first, second = load(folder)[0], load(write(tmp_path / "changed", flipped))[0]
    second.source = second.source.__class__(**{**vars(second.source), "name": first.source.name})
    assert jax.tree.structure(first) == jax.tree.structure(second)


# ---- of what is in no directory


def test_a_drawn_model_is_what_it_follows_from(folder):
    cases = [(seed, dtype) for seed in (1, 2) for dtype in (None, "bfloat16")]
    marks = [mark(folder, init="random", seed=seed, param_dtype=dtype) for seed, dtype in cases]
    assert len({*marks, mark(folder)}) == 5
    assert mark(folder, init="random", seed=1, mesh=make_mesh(1, 8, 1)) == marks[0]
