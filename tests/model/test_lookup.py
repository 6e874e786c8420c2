"""Rows looked up by token, and their gradient, over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.model.lookup import look_up
from sft_jax.model.sharding import make_mesh, mesh_axes_for

VOCAB, HIDDEN, ROWS, LENGTH = 48, 32, 8, 24
EMBEDDING, POSITIONS, SIDE = ("vocab", "embed"), (None, "embed"), ("vocab", "rank")
MESHES = {
    "one": dict(),
    "fsdp8": dict(fsdp=8),
    "tensor4_fsdp2": dict(fsdp=2, tensor=4),
    "data2_fsdp2_context2": dict(data=2, fsdp=2, context=2),
    "expert2_context2_tensor2": dict(expert=2, context=2, tensor=2),
    "data4_context2": dict(data=4, context=2),
}


def case(mesh, axes, batch: int = ROWS, length: int = LENGTH, dtype="float32"):
    """A table and tokens where they lie in training, and a cotangent."""
    random = np.random.default_rng(0)
    table = random.normal(size=(VOCAB, HIDDEN)).astype(dtype)
    tokens = random.integers(0, VOCAB, (batch, length)).astype(np.int32)
    cotangent = random.normal(size=(batch, length, HIDDEN)).astype(np.float32)
    if mesh is None:
        return table, tokens, cotangent
    cut = (None if axis is None else mesh_axes_for(mesh, axis, size) for axis, size in zip(axes, table.shape))
    rows = P(mesh_axes_for(mesh, "batch", batch), mesh_axes_for(mesh, "length", length))
    table = jax.device_put(table, NamedSharding(mesh, P(*cut)))
    return table, *(jax.device_put(x, NamedSharding(mesh, rows)) for x in (tokens, cotangent))


def with_gradient(table, tokens, cotangent, axes, mesh, dtype="float32"):
    def run(table, tokens, cotangent):
        x, back = jax.vjp(lambda table: look_up(table, tokens, dtype, axes, mesh), table)
        return x, back(cotangent.astype(x.dtype))[0]

    return jax.jit(run), run


def expected(table, tokens, cotangent):
    """In float64, token by token."""
    gradient = np.zeros(np.shape(table))
    np.add.at(gradient, np.asarray(tokens).reshape(-1), np.asarray(cotangent, np.float64).reshape(-1, HIDDEN))
    return np.asarray(table)[np.asarray(tokens)], gradient


def mesh_of(name):
    return make_mesh(**{"fsdp": 1, **MESHES[name]}) if MESHES[name] else None


@pytest.mark.parametrize("axes", [EMBEDDING, POSITIONS, SIDE], ids=str)
@pytest.mark.parametrize("name", MESHES)
def test_rows_and_gradient(name, axes):
    mesh = mesh_of(name)
    inputs = case(mesh, axes)
    x, gradient = with_gradient(*inputs, axes, mesh)[0](*inputs)
    rows, sums = expected(*inputs)
    np.testing.assert_array_equal(x, rows)
    np.testing.assert_allclose(gradient, sums, rtol=1e-6, atol=1e-5)
    if mesh is not None:
        assert gradient.sharding.is_equivalent_to(inputs[0].sharding, 2)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 24), (8, 1), (3, 5)])
@pytest.mark.parametrize("name", ["data2_fsdp2_context2", "expert2_context2_tensor2"])
def test_tokens_that_the_mesh_does_not_divide(name, batch, length):
    """One prompt, or one token of each, as when text is generated: along some axes all devices have the same tokens."""
    mesh = mesh_of(name)
    inputs = case(mesh, EMBEDDING, batch, length)
    x, gradient = with_gradient(*inputs, EMBEDDING, mesh)[0](*inputs)
    rows, sums = expected(*inputs)
    np.testing.assert_array_equal(x, rows)
    np.testing.assert_allclose(gradient, sums, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["one", "fsdp8", "tensor4_fsdp2"])
def test_what_is_no_token_is_not_a_number_and_has_no_gradient(name):
    mesh = mesh_of(name)
    table, tokens, cotangent = case(mesh, EMBEDDING)
    wrong = np.array(tokens)
    wrong[0, :3] = (-1, VOCAB, VOCAB + 7)
    outside = (wrong < 0) | (wrong >= VOCAB)
    run, _ = with_gradient(table, tokens, cotangent, EMBEDDING, mesh)
    x, gradient = run(table, jax.device_put(wrong, getattr(tokens, "sharding", None)), cotangent)
    assert np.array_equal(np.isnan(x).all(axis=-1), outside) and np.isfinite(np.asarray(x)[~outside]).all()
    kept = np.where(outside[..., None], 0, cotangent)
    np.testing.assert_allclose(gradient, expected(table, np.where(outside, 0, wrong), kept)[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["one", "data2_fsdp2_context2"])
def test_sums_are_of_float32_whatever_is_computed_in(name):
    """One token 192 times: bfloat16 would stop counting at 256 x the last bit."""
    mesh = mesh_of(name)
    table, tokens, cotangent = case(mesh, EMBEDDING, dtype="float32")
    tokens, cotangent = jnp.full_like(tokens, 5), jnp.full_like(cotangent, 1 + 2**-7)
    run, _ = with_gradient(table, tokens, cotangent, EMBEDDING, mesh, "bfloat16")
    assert np.array_equal(run(table, tokens, cotangent)[1][5], np.full(HIDDEN, ROWS * LENGTH * (1 + 2**-7)))


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_no_device_holds_the_table_whole(name):
    """Neither its rows nor their gradient."""
    mesh = mesh_of(name)
    inputs = case(mesh, EMBEDDING)
    text = with_gradient(*inputs, EMBEDDING, mesh)[0].lower(*inputs).compile().as_text()
    rows, columns = inputs[0].sharding.shard_shape(inputs[0].shape)
    assert f"f32[{rows},{columns}]" in text
    found = {tuple(map(int, shape)) for shape in re.findall(r"\[(48|24|12),(32|16|8|4)\]", text)}
    assert found == {(rows, columns)}
