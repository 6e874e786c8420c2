"""Streaming equals cutting the tensors with numpy, whatever they hold and wherever the parameters lie."""

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.checkpoint.integrity import checksums
from sft_jax.hf import files, stream
from sft_jax.hf.files import SINGLE_FILE, open_tensors
from sft_jax.hf.fingerprint import Checksums
from sft_jax.hf.rules import Rule, expand
from sft_jax.hf.stream import stream_parameters
from sft_jax.model.runs import Place
from sft_jax.model.sharding import make_mesh

EXPERTS = 4
RULES = [
    Rule("embed", "embed.embedding"),
    Rule("l.{layer}.qkv.weight", ("q", "k", "v"), transpose=True),
    Rule("l.{layer}.qkv.bias", ("q_bias", "k_bias", "v_bias")),
    Rule("l.{layer}.columns", ("gate", "up"), axis=1),
    Rule("l.{layer}.experts.turns", ("expert_gate", "expert_up"), axis=2, interleaved=True, layers=(0, 2)),
    Rule("l.{layer}.experts.{expert}.down", "expert_down", transpose=True, layers=(0, 2)),
    Rule("l.{layer}.experts.{expert}.pair", ("first", "second"), transpose=True, layers=(0, 2)),
    Rule("head", "head", transpose=True),
]
PLACES = [Place(0, 0, 0), Place(1, 0, 0), Place(0, 0, 1)]
BLOCK = {
    "q": (8, 16), "k": (8, 4), "v": (8, 4), "q_bias": (16,), "k_bias": (4,), "v_bias": (4,), "gate": (8, 6), "up": (8, 6)
}  # fmt: skip
SPARSE = {"expert_gate": (8, 5), "expert_up": (8, 5), "expert_down": (6, 8), "first": (8, 2), "second": (8, 4)}
PARAMS = {
    "embed.embedding": (24, 8),
    "head": (8, 24),
    **{f"runs.{run}.0.{name}": (2 - run, *shape) for run in (0, 1) for name, shape in BLOCK.items()},
    **{f"runs.0.0.{name}": (2, EXPERTS, *shape) for name, shape in SPARSE.items()},
}
STORED = expand(RULES, PLACES, PARAMS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    held = {path: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for path, shape in PARAMS.items()}
    tensors = {t.name: t.packing.join([held[path][t.index] for path in t.paths]) for t in STORED}
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / SINGLE_FILE)
    return folder, held


def layouts(mesh):
    """Every parameter over all devices where its size allows, along a dimension that is not the one it is read by."""
    axes = ("fsdp", "tensor")
    size = mesh.shape["fsdp"] * mesh.shape["tensor"]
    spec = lambda shape: P(*[None] * (len(shape) - 1), axes if shape[-1] % size == 0 else None)  # noqa: E731
    return {
        path: jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec(shape)))
        for path, shape in PARAMS.items()
    }


def load(folder, mesh, dtype="bfloat16"):
    like, sums, dtypes = layouts(mesh), Checksums(), dict.fromkeys(PARAMS, dtype)
    return like, dict(stream_parameters(open_tensors(folder), mesh, STORED, like, dtypes, sums)), sums.totals()


@pytest.mark.parametrize("group", [1, 2 * 6 * 8 * 2, 1 << 28])  # bytes: one expert, two, all of a layer
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_mesh_and_size_of_group(written, sizes, group, monkeypatch):
    monkeypatch.setattr(stream, "_GROUP_BYTES", group)
    like, arrays, sums = load(written[0], make_mesh(*sizes, jax.devices()[: np.prod(sizes)]))
    assert arrays.keys() == PARAMS.keys()
    for path, array in arrays.items():
        assert (array.sharding, array.dtype.name) == (like[path].sharding, "bfloat16"), path
        assert np.asarray(array).tobytes() == written[1][path].tobytes(), path
    tensors = safetensors.numpy.load_file(written[0] / SINGLE_FILE)
    whole = {name: jax.numpy.asarray(tensor) for name, tensor in tensors.items()}
    assert sums == checksums(whole)  # of each tensor as it is in the file, whatever it was cut into


def test_a_cast_while_loading(written):
    _, arrays, _ = load(written[0], make_mesh(1, 8, 1), "float32")
    for path, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(array), written[1][path].astype(np.float32))


def test_every_byte_is_read_once_and_experts_together(written, monkeypatch):
    read, staged = [], []
    original, make_array = files.TensorDirectory.read, jax.make_array_from_callback

    def counted(self, name, first=0, count=None):
        array = original(self, name, first, count)
        read.append((name, first, array.nbytes))
        return array

    def made(shape, *rest):
        staged.append(shape)
        return make_array(shape, *rest)

    monkeypatch.setattr(files.TensorDirectory, "read", counted)
    monkeypatch.setattr(jax, "make_array_from_callback", made)
    load(written[0], make_mesh(1, 8, 1))
    total = sum(info.nbytes for info in open_tensors(written[0]).tensors.values())
    assert sum(size for *_, size in read) == total and len({part[:2] for part in read}) == len(read)
    # Embedding, head; q, k, v with bias of three layers; columns of three; three kinds of experts of two.
    assert len(staged) == 2 + 6 * 3 + 3 + 3 * 2
    assert staged.count((EXPERTS, 8, 6)) == 2


def test_parameters_come_as_soon_as_they_are_full(written):
    """At most the parameters of one tensor are unfinished at a time: what comes can be made smaller before the next."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    before = {id(x) for x in jax.live_arrays()}
    dtypes = dict.fromkeys(PARAMS, "float32")
    for path, array in stream_parameters(open_tensors(written[0]), mesh, STORED, layouts(mesh), dtypes, Checksums()):
        live = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
        siblings = {part for tensor in STORED if path in tensor.paths for part in tensor.paths}
        # Those parameters, what is staged of them (bfloat16, at most a layer), and a checksum a tensor.
        assert live <= 1.6 * 4 * sum(np.prod(PARAMS[part]) for part in siblings) + 8 * len(STORED), path
        del array
