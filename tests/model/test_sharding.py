"""Meshes, and the shardings that follow from the logical axes of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.errors import UserError
from sft_jax.model.sharding import (
    AXES,
    LAYOUT,
    MESH_AXES,
    abstract_mesh,
    batch_sharding,
    constrain_fn,
    is_variable,
    largest_replicated,
    make_mesh,
    named_leaves,
    shardings,
)


EMBED, ROWS = LAYOUT["embed"], LAYOUT["batch"]


class Toy(nnx.Module):
    def __init__(self):
        self.key = nnx.Param(jnp.ones((2, 32, 24)), axes=("layers", "embed", "kv_heads"), units=FrozenDict(kv_heads=4))
        self.embedding = nnx.Param(jnp.ones((16, 32)), axes=("vocab", "embed"))
        self.scale = nnx.Param(jnp.ones((32,)), axes=("norm",))


@pytest.fixture(scope="module")
def params():
    return nnx.state(Toy())


def specs(tree, mesh) -> dict[str, P]:
    leaves = named_leaves(shardings(tree, mesh))
    return {path: (leaf.get_value() if is_variable(leaf) else leaf).spec for path, leaf in leaves}


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        (dict(), (1, 8, 1, 1, 1)),
        (dict(data=-1, fsdp=1), (8, 1, 1, 1, 1)),
        (dict(data=2, fsdp=2, tensor=2), (2, 2, 1, 1, 2)),
        (dict(data=2, fsdp=-1, tensor=4), (2, 1, 1, 1, 4)),
        (dict(fsdp=4, tensor=-1), (1, 4, 1, 1, 2)),
        (dict(expert=2, context=2), (1, 2, 2, 2, 1)),
        (dict(fsdp=1, context=-1), (1, 1, 1, 8, 1)),
    ],
)
def test_make_mesh(asked, shape):
    mesh = make_mesh(**asked)
    assert tuple(mesh.shape.items()) == tuple(zip(MESH_AXES, shape, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())


def test_make_mesh_over_some_devices():
    assert list(make_mesh(1, -1, 1, jax.devices()[2:4]).devices.flat) == jax.devices()[2:4]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((3, -1, 1), r"mesh.data=3, mesh.fsdp=-1, mesh.expert=1, mesh.context=1, mesh.tensor=1: needs a multiple of 3 devices, but there are 8 cpu"),
        ((2, 2, 1), r"needs 4 devices, but there are 8 cpu devices; make them multiply to 8, or set one of them to -1"),
        ((16, -1, 1), "needs a multiple of 16 devices, but there are 8"),
        ((-1, -1, 1), "mesh.data, mesh.fsdp: only one axis can be -1"),
        ((1, 1, 0), "mesh.tensor: must be at least 1, or -1"),
        ((1, -2, 1), "mesh.fsdp: must be at least 1, or -1"),
    ],
)
def test_a_mesh_that_does_not_match_the_devices(asked, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*asked)


def test_parameters(params):
    assert specs(params, make_mesh(2, 2, 2)) == {
        "key": P(None, EMBED, "tensor"), "embedding": P("tensor", EMBED), "scale": P(None),
    }  # fmt: skip


def test_a_mesh_of_absent_devices_gives_the_same(params):
    assert specs(params, abstract_mesh(2, 2, 2)) == specs(params, make_mesh(2, 2, 2))


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=4)])
def test_optimizer_state(params, optimizer):
    """Moments lie where their parameter lies; counts and factored moments are everywhere; all can be made in place."""
    mesh = make_mesh(1, 4, 2)
    state = jax.eval_shape(optimizer.init, params)
    placed = jax.jit(optimizer.init, out_shardings=shardings(state, mesh))(params)
    expected = {
        leaf.shape: spec for (_, leaf), spec in zip(named_leaves(params), specs(params, mesh).values(), strict=True)
    }
    full, others = 0, 0
    for path, leaf in named_leaves(placed):
        array = leaf.get_value() if is_variable(leaf) else leaf
        is_full = is_variable(leaf) and array.shape in expected
        spec = expected[array.shape] if is_full else P()
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), path
        full, others = full + is_full, others + (not is_full)
    assert full >= 2 and others >= 1


def test_the_head_count_decides_not_the_size(params):
    """24 = 4 kv heads x 6: eight devices divide the size, but not the heads."""
    with pytest.raises(UserError, match=r"key \(2, 32, 24\): mesh.tensor=8 does not divide 4 kv_heads; .* 1, 2, 4\."):
        shardings(params, make_mesh(1, 1, 8))


def test_a_size_that_does_not_divide():
    params = nnx.state(Toy())
    params["embedding"] = nnx.Param(jnp.ones((16, 30)), axes=("vocab", "embed"))
    with pytest.raises(UserError, match=r"embedding \(16, 30\): mesh.fsdp=4, mesh.expert=1, mesh.context=1 does not divide axis 'embed' of size 30"):
        shardings({"model": params}, make_mesh(2, 4, 1))


def test_an_unknown_axis():
    params = {"block": nnx.Param(jnp.ones((4,)), axes=("embde",))}
    with pytest.raises(UserError, match="block: has the unknown axis 'embde'; did you mean 'embed'"):
        shardings(params, make_mesh())


def test_one_mesh_axis_twice():
    params = {"block": nnx.Param(jnp.ones((8, 8)), axes=("heads", "mlp"))}
    with pytest.raises(UserError, match="block: the axes 'heads' and 'mlp' both lie on the mesh axis 'tensor'"):
        shardings(params, make_mesh())


def test_the_layout_names_only_mesh_axes():
    assert AXES == tuple(LAYOUT)
    assert {mesh_axis for mesh_axes in LAYOUT.values() for mesh_axis in mesh_axes} == set(MESH_AXES)


def test_constrain():
    mesh = make_mesh(1, 2, 2, context=2)
    constrain = jax.jit(constrain_fn(mesh), static_argnums=1)
    x = jnp.arange(8 * 4 * 4.0).reshape(8, 4, 4)
    y = constrain(x, ("batch", "length", "act_mlp"))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(ROWS, "context", "tensor")), 3)
    np.testing.assert_array_equal(x, y)
    whole = constrain(x[:1], ("batch", None, "act_mlp"))  # one row does not divide, and stays whole
    assert whole.sharding.is_equivalent_to(NamedSharding(mesh, P(None, None, "tensor")), 3)


def test_constrain_refuses_unknown_axes():
    with pytest.raises(UserError, match="unknown axis 'rows'"):
        constrain_fn(make_mesh())(jnp.ones((8,)), ("rows",))


def test_equal_meshes_share_compiled_code():
    assert constrain_fn(make_mesh(2, 2, 2)) == constrain_fn(make_mesh(2, 2, 2))
    assert hash(constrain_fn(make_mesh(2, 2, 2))) == hash(constrain_fn(make_mesh(2, 2, 2)))
    assert constrain_fn(make_mesh(2, 2, 2)) != constrain_fn(make_mesh(1, 4, 2))


def test_batch_sharding():
    mesh = make_mesh(2, 2, 2)
    assert batch_sharding(mesh).spec == P(ROWS)
    assert batch_sharding(mesh, 1).spec == P(None, ROWS)


def test_the_largest_replicated_arrays(params):
    rows = largest_replicated({"params": params, "step": jnp.int32(0)}, make_mesh(2, 2, 2))
    assert [(row.path, row.bytes_per_device, row.copies, row.over) for row in rows] == [
        ("params.key", 2 * 16 * 12 * 4, 2, ("data",)),
        ("params.embedding", 8 * 16 * 4, 2, ("data",)),
        ("params.scale", 32 * 4, 8, ("data", "fsdp", "tensor")),
        ("step", 4, 8, ("data", "fsdp", "tensor")),
    ]
    assert largest_replicated(params, make_mesh(1, 4, 2), count=1)[0].path == "scale"
    assert largest_replicated(params, make_mesh(1, 1, 1, jax.devices()[:1])) == []
