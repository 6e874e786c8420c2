"""Logical axes, the layout that maps them to mesh axes, and the shardings that follow from both.

A parameter is declared with `nnx.Param(value, axes=(...), units={...})`: `axes` names each dimension by an entry of
`AXES`; `units` says for an axis that is a product, such as heads x head size, how many pieces it may be cut into (a
hashable mapping, because metadata is part of the tree's structure); `whole_where_uneven` that an axis which the mesh does
not divide is not cut. Everything else is derived here by one function:
shardings of parameters, of the optimizer state (optax moments carry the metadata of their parameter) and of restore
targets. `constrain_fn` is the only way to shard an activation.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.devices import arranged

# The first lie furthest apart: neighbouring devices talk along the last ones, which talk most.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
_AUTO = (AxisType.Auto,) * len(MESH_AXES)  # the compiler propagates shardings; `constrain` pins them

# Logical axis -> mesh axes. The keys are the closed set of logical axes; `None` as an axis is never sharded.
LAYOUT: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),  # the stacked repeats of a run; lax.scan walks it
    "embed": ("fsdp", "expert", "context"),  # hidden size; gathered before it is read
    "heads": ("tensor",),  # heads x head size
    "kv_heads": ("tensor",),  # kv heads x head size
    "mlp": ("tensor",),
    "expert": ("expert",),  # experts of a layer; their kernels are cut like those of an MLP
    "expert_embed": ("fsdp", "context"),  # hidden size of kernels of experts
    "router": (),  # the router's output, one number an expert
    "latent": (),  # the latent states that keys and values are made from
    "rank": (),  # of adapters
    "side": ("tensor", "fsdp", "expert", "context"),  # of adapters: heads or inner size, gathered over all but `tensor` to be read
    "expert_side": ("tensor", "fsdp", "context"),  # the same of experts
    "vocab": ("tensor",),
    "norm": (),  # scales and biases: too small to be worth a gather
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}
AXES = tuple(LAYOUT)
TOKENS = "tokens_of_others"  # how compiled programs name what is gathered of activations, which is no parameter
GATHERED = ("embed", "expert_embed")  # axes of parameters that are whole again where the parameter is read

AnyMesh = Mesh | AbstractMesh


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    context: int = 1,
    expert: int = 1,
) -> Mesh:
    """Returns the mesh of MESH_AXES over `devices`, by default all; one size may be -1, for what is left.

    Raises UserError when the sizes do not multiply to the number of devices, or cannot be laid over several slices
    (sft_jax.model.devices).
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{name}: must be at least 1, or -1 for what is left, not {size}.")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh.{', mesh.'.join(free)}: only one axis can be -1.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        remedy = (
            f"make the other sizes multiply to a divisor of {len(devices)}"
            if free
            else f"make them multiply to {len(devices)}, or set one of them to -1 for what is left"
        )
        raise UserError(f"{asked}: needs {'a multiple of ' if free else ''}{fixed} devices, but there are "
                        f"{len(devices)} {devices[0].platform} devices; {remedy}.")  # fmt: skip
    return Mesh(arranged(devices, {axis: sizes[axis] for axis in MESH_AXES}), MESH_AXES, axis_types=_AUTO)


def abstract_mesh(data: int, fsdp: int, tensor: int, *, context: int = 1, expert: int = 1) -> AbstractMesh:
    """Returns a mesh of devices that need not exist, to derive shardings and to compile for."""
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    return AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, axis_types=_AUTO)


def pieces_along(mesh: AnyMesh, axis: str) -> int:
    """Returns into how many pieces `mesh` cuts a logical axis."""
    return math.prod(mesh.shape[name] for name in LAYOUT[axis])


def mesh_axes_for(mesh: AnyMesh, axis: str, size: int) -> tuple[str, ...]:
    """Returns the mesh axes that a logical axis of `size` is cut over, none where they do not divide it."""
    return LAYOUT[axis] if size % pieces_along(mesh, axis) == 0 else ()


def shardings(tree, mesh: AnyMesh):
    """Returns `tree` with a NamedSharding in place of every array; works on arrays and on abstract values alike.

    `tree` is any pytree that may hold nnx Variables: a module's state, a train state, an optimizer state. Arrays
    outside Variables, and arrays whose rank is not their metadata's (step counts, the factored moments of adafactor),
    are replicated. Raises UserError with the path of the parameter whose axes are unknown, collide on one mesh axis or
    do not divide.
    """

    def place(path, node):
        if not is_variable(node):
            return NamedSharding(mesh, P())
        metadata, shape = node.get_metadata(), node.get_value().shape
        spec = P()
        if metadata.get("axes") is not None and len(metadata["axes"]) == len(shape):
            units, whole = metadata.get("units") or {}, metadata.get("whole_where_uneven", False)
            spec = partition_spec(path_name(path), metadata["axes"], shape, mesh.shape, units, whole)
        return node.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_variable)


def made_like(make: Callable, like, *arguments):
    """Returns `make(*arguments)`, laid out by its metadata on the mesh that the arrays of `like` lie on.

    Abstract where `like` is, and where something is being compiled a part of it. `make` is hashable, and compiled once for
    all that are equal.
    """
    like = jax.tree.leaves(like)[0]
    if isinstance(like, jax.core.Tracer):
        return make(*arguments)
    abstract = jax.eval_shape(make, *arguments)
    sharding = getattr(like, "sharding", None)
    layout = shardings(abstract, sharding.mesh) if isinstance(sharding, NamedSharding) else None
    if not isinstance(like, jax.ShapeDtypeStruct):
        leaves, structure = jax.tree.flatten(layout)
        return _maker(make, tuple(leaves), structure)(*arguments)
    if layout is None:
        return abstract
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, abstract, layout)


@functools.lru_cache(maxsize=256)
def _maker(make: Callable, layout: tuple, structure) -> Callable:
    return jax.jit(make, out_shardings=jax.tree.unflatten(structure, layout))


def partition_spec(
    path: str,
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh_shape: Mapping[str, int],
    units: Mapping[str, int],
    whole_where_uneven: bool = False,
) -> P:
    """Returns the PartitionSpec of one parameter; raises UserError naming `path` where there is none.

    An axis that the mesh does not divide is left whole with `whole_where_uneven`, and an error otherwise.
    """
    taken: dict[str, str] = {}
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = _mesh_axes(axis, path)
        for mesh_axis in mesh_axes:
            if mesh_axis in taken:
                raise UserError(
                    f"{path}: the axes '{taken[mesh_axis]}' and '{axis}' both lie on the mesh axis '{mesh_axis}'; "
                    "change one of them in sft_jax.model.sharding.LAYOUT."
                )
            taken[mesh_axis] = axis
        pieces = math.prod(mesh_shape[mesh_axis] for mesh_axis in mesh_axes)
        count = units.get(axis, size)
        uneven = size != 1 and count % pieces
        if uneven and not whole_where_uneven:
            setting = ", ".join(f"mesh.{mesh_axis}={mesh_shape[mesh_axis]}" for mesh_axis in mesh_axes)
            what = f"{count} {axis}" if axis in units else f"axis '{axis}' of size {count}"
            raise UserError(f"{path} {tuple(shape)}: {setting} does not divide {what}; {_divisors(count, mesh_axes)}.")
        spec.append(_entry(mesh_axes if not uneven and (size != 1 or pieces == 1) else ()))
    return P(*spec)


@dataclass(frozen=True)
class Constrain:
    """Lays an activation out by its logical axes. A value, not a closure, so that equal meshes share compiled code."""

    mesh: Mesh

    def __call__(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        spec = []
        for axis, size in zip(axes, x.shape, strict=True):
            mesh_axes = _mesh_axes(axis, "activation")
            pieces = math.prod(self.mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
            spec.append(_entry(mesh_axes if size % pieces == 0 else ()))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))


def constrain_fn(mesh: Mesh) -> Constrain:
    """Returns `constrain(x, axes)` for the model's options: the only way to shard an activation.

    A dimension that its mesh axes do not divide, such as a batch of one prompt on eight devices, stays whole: this
    changes where numbers lie and never what they are. Raises UserError for an axis that is not in `AXES`.
    """
    return Constrain(mesh)


def batch_sharding(mesh: AnyMesh, batch_dim: int = 0) -> NamedSharding:
    """Returns the sharding of input arrays whose dimension `batch_dim` counts rows."""
    return NamedSharding(mesh, P(*([None] * batch_dim), LAYOUT["batch"]))


@dataclass(frozen=True)
class Replicated:
    """An array of which the mesh holds more than one copy."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes_per_device: int
    copies: int
    over: tuple[str, ...]  # mesh axes (of size above 1) along which the copies lie


def largest_replicated(tree, mesh: AnyMesh, count: int | None = 8) -> list[Replicated]:
    """Returns the arrays of `tree` that take the most memory a device and exist more than once, largest first; None: all."""
    placed = [leaf for _, leaf in named_leaves(shardings(tree, mesh))]
    rows = []
    for (path, leaf), sharding in zip(named_leaves(tree), placed, strict=True):
        array, sharding = (leaf.get_value(), sharding.get_value()) if is_variable(leaf) else (leaf, sharding)
        used = {name for entry in sharding.spec for name in _names(entry)}
        over = tuple(name for name, size in mesh.shape.items() if size > 1 and name not in used)
        if over:
            dtype = np.dtype(array.dtype)
            rows.append(
                Replicated(
                    path=path,
                    shape=tuple(array.shape),
                    dtype=dtype.name,
                    bytes_per_device=math.prod(sharding.shard_shape(array.shape)) * dtype.itemsize,
                    copies=math.prod(mesh.shape[name] for name in over),
                    over=over,
                )
            )
    return sorted(rows, key=lambda row: (-row.bytes_per_device, row.path))[:count]


def _mesh_axes(axis: str | None, path: str) -> tuple[str, ...]:
    if axis is None:
        return ()
    if axis not in LAYOUT:
        raise UserError(f"{path}: has the unknown axis '{axis}'; {did_you_mean(axis, AXES)}.")
    return LAYOUT[axis]


def _divisors(count: int, mesh_axes: tuple[str, ...]) -> str:
    fitting = [str(d) for d in range(1, min(count, 64) + 1) if count % d == 0]
    return f"mesh.{' x mesh.'.join(mesh_axes)} can be {', '.join(fitting)}"


def _entry(mesh_axes: tuple[str, ...]):
    return None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def named_leaves(tree) -> list[tuple[str, Any]]:
    """Returns the nnx Variables and other leaves of `tree` with their paths, such as `runs.0.1.mlp.up.kernel`."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)]


def path_name(path) -> str:
    """Returns a tree path joined by dots."""
    return ".".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)
