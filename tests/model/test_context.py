"""Zig-zag order of rows over devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sft_jax.model.context import context_parts, from_zigzag, gather_rows, own_indices, to_zigzag
from sft_jax.model.sharding import make_mesh


def order(parts: int, length: int) -> np.ndarray:
    """The indices in zig-zag order."""
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([np.concatenate([chunks[i], chunks[2 * parts - 1 - i]]) for i in range(parts)])


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_there_and_back(parts):
    mesh = make_mesh(1, -1, 1, jax.devices()[: 8 // parts * parts], context=parts)
    rows = mesh.shape["fsdp"]
    x = np.random.default_rng(0).normal(size=(rows, 4 * parts, 3)).astype(np.float32)
    there = jax.jit(to_zigzag, static_argnums=1)(x, mesh)
    np.testing.assert_array_equal(there, x[:, order(parts, 4 * parts)])
    np.testing.assert_array_equal(jax.jit(from_zigzag, static_argnums=1)(there, mesh), x)

    def whole(x):
        return gather_rows(x, parts), own_indices(parts, 4 * parts)

    run = jax.shard_map(
        whole, mesh=mesh, in_specs=P("fsdp", "context"), out_specs=(P("fsdp"), P("context")), check_vma=False
    )
    gathered, indices = jax.jit(run)(there)
    np.testing.assert_array_equal(gathered, x)
    np.testing.assert_array_equal(indices, order(parts, 4 * parts))


def test_devices_share_the_work_of_a_long_document():
    pairs = (order(4, 64) + 1).reshape(4, -1).sum(axis=1)  # keys at or before each query
    assert (pairs == pairs[0]).all()


def test_rows_that_cannot_be_cut_stay_whole():
    mesh = make_mesh(1, 2, 1, context=4)
    assert [context_parts(mesh, length) for length in (16, 12, 1)] == [4, 1, 1]
    x = np.ones((2, 12))
    assert to_zigzag(x, mesh) is x and context_parts(None, 16) == 1
