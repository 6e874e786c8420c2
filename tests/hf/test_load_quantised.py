"""Bases that are quantised while they are read: bit for bit what quantising the numbers in the file gives, on every mesh."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from quantised_numbers import REFERENCES
from slow_values import slow
from tiny_models import ALL_CONFIGS, from_tensors, randomized, to_tensors

from sft_jax.hf.files import SINGLE_FILE
from sft_jax.hf.load import load_decoder
from sft_jax.model.attach import merge
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.options import Options
from sft_jax.model.quantise import quantise
from sft_jax.model.sharding import make_mesh, named_leaves, shardings

# Sizes of which eight devices hold whole blocks; tensors that hold one kernel, several side by side, turns, or one expert.
CONFIGS = {
    name: ALL_CONFIGS[name] | dict(hidden_size=128, head_dim=64, num_attention_heads=4, num_key_value_heads=2) | changes
    for name, changes in {
        "llama": dict(intermediate_size=256),
        "phi3": dict(intermediate_size=256, rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}),
        "gpt_oss": dict(intermediate_size=128), "qwen3_moe": dict(intermediate_size=128, moe_intermediate_size=128),
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns a function name -> (folder, the decoder that it holds in bfloat16)."""
    made = {}

    def write(name: str):
        if name not in made:
            folder, config = tmp_path_factory.mktemp(name), CONFIGS[name]
            spec = spec_from_config(config)
            decoder = randomized(jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0))))
            tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in to_tensors(decoder, decoder, config).items()}
            safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / SINGLE_FILE)
            (folder / "config.json").write_text(json.dumps(config))
            abstract = jax.eval_shape(lambda: decoder)
            made[name] = folder, from_tensors(abstract, {key: value.astype(np.float32) for key, value in tensors.items()}, config)
        return made[name]

    return write


def assert_equal(ours, theirs) -> None:
    for (path, a), (_, b) in zip(named_leaves(ours), named_leaves(theirs), strict=True):
        assert np.asarray(a[...]).tobytes() == np.asarray(b[...].astype(a[...].dtype)).tobytes(), path


@pytest.mark.parametrize("name, stored_as, sizes", [
    ("llama", "nf4", (2, 2, 2)), ("llama", "fp8", None), ("phi3", "nf4", (2, 2, 2)), ("qwen3_moe", "int8", None),
    *slow(("llama", "nf4", None), ("llama", "int8", (1, 8, 1)), ("gpt_oss", "nf4", (2, 2, 2)), ("qwen3_moe", "nf4", (2, 2, 2))),
])  # fmt: skip
def test_what_is_read_is_what_is_quantised(name, stored_as, sizes, written):
    folder, decoder = written(name)
    mesh = None if sizes is None else make_mesh(*sizes)
    read = load_decoder(folder, Options(), mesh, stored_as=stored_as)
    assert_equal(read, quantise(decoder, stored_as))
    assert read.source.fingerprint == load_decoder(folder, Options()).source.fingerprint
    if mesh is not None:
        for (path, leaf), (_, place) in zip(named_leaves(read), named_leaves(shardings(read, mesh)), strict=True):
            assert leaf.get_value().sharding == place.get_value(), path


def test_against_numpy(written):
    """From the bytes of the file, with nothing of the package in between."""
    folder, _ = written("qwen3_moe")
    read = {path: np.asarray(leaf[...]) for path, leaf in named_leaves(load_decoder(folder, Options(), stored_as="nf4"))}
    tensors = safetensors.numpy.load_file(folder / SINGLE_FILE)
    kernel = tensors["model.layers.2.mlp.experts.2.down_proj.weight"].astype(np.float32).T
    codes, scales, _ = REFERENCES["nf4"](kernel)
    np.testing.assert_array_equal(read["runs.0.2.mlp.down.kernel.codes"][0, 2], codes)
    np.testing.assert_array_equal(read["runs.0.2.mlp.down.kernel.scales"][0, 2], scales)


def test_no_kernel_is_ever_whole(written):
    """While reading, nothing lives but what is done, which is small, and a tensor."""
    folder, decoder = written("llama")
    before = {id(x) for x in jax.live_arrays()}
    seen = []

    def watch(done, total):
        seen.append(max((x.nbytes for x in jax.live_arrays() if id(x) not in before and x.dtype != np.uint8), default=0))

    read = load_decoder(folder, Options(), stored_as="nf4", progress=watch)
    tables = {leaf.get_value().nbytes for path, leaf in named_leaves(read) if ".kernel." not in path}
    stack = decoder.runs[0][0].mlp.up.kernel.get_value()
    assert len(seen) > 10 and max(seen) <= max(*tables, stack.nbytes // stack.shape[0] // 2)


@pytest.mark.parametrize("asked", [None, "float32"])
def test_the_dtype_that_is_asked_for_is_that_of_what_stays_and_of_the_merged_model(asked, written):
    """Codes are of the numbers in the file, whatever is asked for."""
    folder, decoder = written("llama")
    read = load_decoder(folder, Options(), param_dtype=asked, stored_as="int8")
    assert_equal(read, quantise(decoder, "int8"))
    dtypes = {leaf.get_value().dtype.name for path, leaf in named_leaves(read) if ".kernel." not in path}
    assert dtypes == {asked or "bfloat16"} == {leaf.dtype.name for leaf in jax.tree.leaves(merge(read))}


def test_a_model_that_is_drawn(written):
    folder, _ = written("llama")
    for mesh in (None, make_mesh(2, 2, 2)):
        drawn = load_decoder(folder, Options(), mesh, init="random", seed=3, stored_as="nf4")
        assert_equal(drawn, quantise(load_decoder(folder, Options(), init="random", seed=3), "nf4"))


def test_a_mesh_that_blocks_do_not_divide(written):
    """Two blocks over eight devices: codes are cut within them, scales lie whole, and all are what they are on one device."""
    folder = written("llama")[0]
    one, eight = (dict(named_leaves(load_decoder(folder, Options(), mesh, stored_as="nf4"))) for mesh in (None, make_mesh(1, 8, 1)))
    for path, leaf in one.items():
        np.testing.assert_array_equal(eight[path][...], leaf[...], err_msg=path)
    codes, scales = (eight[f"runs.0.0.attention.key.kernel.{name}"][...] for name in ("codes", "scales"))
    assert codes.addressable_shards[0].data.size * 8 == codes.size and scales.addressable_shards[0].data.size == scales.size
