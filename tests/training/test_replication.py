"""Layouts that leave much of the state in copies."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sft_jax.errors import UserError
from sft_jax.model.sharding import make_mesh, shardings
from sft_jax.training.replication import check_replication


def state(mesh):
    """Abstract: a kernel of 4 GiB that fsdp and tensor cut, one of 2 GiB that only fsdp cuts, and a small scale."""
    shapes = {
        "cut": ((32768, 32768), ("embed", "mlp")), "half": ((32768, 16384), ("embed", "latent")), "norm": ((32768,), ("norm",)),
    }  # fmt: skip
    tree = {name: nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes) for name, (shape, axes) in shapes.items()}
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, tree, shardings(tree, mesh))


def test_copies_along_other_axes_than_data_are_refused():
    mesh = make_mesh(1, 1, 8)
    message = r"train.max_replicated: 80% .* \(2,048 of 2,560 MiB\) .* 10% may be: half \(2,048 MiB, along tensor\); norm .* mesh.fsdp"
    with pytest.raises(UserError, match=message):
        check_replication(state(mesh), mesh, 0.1)
    check_replication(state(mesh), mesh, 0.81)


@pytest.mark.parametrize("sizes", [dict(data=8, fsdp=1), dict(fsdp=8), dict(fsdp=1, context=8), dict(data=2, fsdp=2, expert=2)])
def test_copies_that_were_asked_for_and_small_ones_are_not(sizes):
    mesh = make_mesh(**sizes)
    check_replication(state(mesh), mesh, 0.0)
