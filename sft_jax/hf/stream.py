"""Streaming the tensors of a checkpoint into the shards of a decoder's parameters.

The host never holds more than a tensor: each process reads its share of a tensor's rows, one contiguous byte range a
device, and one jitted function cuts, transposes, casts and lays it out into its place of the stacked parameter, which
is donated and updated in place. So a process reads 1/n of the checkpoint whatever the layout is.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.hf.files import TensorDirectory
from sft_jax.hf.rules import Packing, Stored

_GROUP_BYTES = 1 << 28  # tensors of experts that are staged together


class _Stage(NamedTuple):
    """What is read at once: a tensor, the rows of it that are one part, or equal tensors of neighbouring experts."""

    names: tuple[str, ...]
    rows: tuple[int, int] | None  # (first, count); None = all
    paths: tuple[str, ...]
    index: tuple[int, ...]  # of the first tensor
    packing: Packing  # of what is read of each tensor


def stream_parameters(
    tensors: TensorDirectory,
    mesh: Mesh,
    stored: Sequence[Stored],
    like: Mapping[str, jax.ShapeDtypeStruct],
    dtypes: Mapping[str, jnp.dtype],
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the path and the array of each parameter as soon as it is filled, with the shape and sharding of `like`.

    Of several processes all must walk through this, in step.
    """
    stages = _plan(stored, {name: info.nbytes for name, info in tensors.tensors.items()})
    left = Counter(path for stage in stages for path in stage.paths)
    filling: dict[str, jax.Array] = {}
    for stage in stages:
        staged = _read(tensors, mesh, stage)
        layouts = tuple((like[path].sharding, jnp.dtype(dtypes[path])) for path in stage.paths)
        if not stage.index:
            filled = _mover(layouts, stage.packing)(staged)
        else:
            for path, layout in zip(stage.paths, layouts, strict=True):
                if path not in filling:
                    filling[path] = _zeros(*layout, like[path].shape)()
            stacks = tuple(filling.pop(path) for path in stage.paths)
            filled = _inserter(layouts, stage.packing)(stacks, staged, np.asarray(stage.index, np.int32))
        filling.update(zip(stage.paths, filled, strict=True))
        jax.block_until_ready(filled)  # so that the host holds one stage at a time
        for path in stage.paths:
            left[path] -= 1
            if not left[path]:
                yield path, filling.pop(path)


def _plan(stored: Sequence[Stored], nbytes: Mapping[str, int]) -> list[_Stage]:
    """Returns what is read, in an order in which a parameter is full before the next one is begun.

    The same in every process, since it follows from the model alone and not from how the files are cut.
    """
    begun: dict[str, int] = {}
    for tensor in stored:
        begun.setdefault(tensor.paths[0], len(begun))
    stages: list[_Stage] = []
    ordered = sorted(stored, key=lambda tensor: (begun[tensor.paths[0]], tensor.index))
    for (paths, _, packing), members in itertools.groupby(
        ordered, key=lambda tensor: (tensor.paths, tensor.index[:1], tensor.packing)
    ):
        members = list(members)
        first = members[0]
        if len(first.index) == 2:
            size = _group_size(len(members), nbytes[first.name])
            for start in range(0, len(members), size):
                names = tuple(tensor.name for tensor in members[start : start + size])
                stages.append(_Stage(names, None, paths, members[start].index, packing))
            continue
        for tensor in members:
            parts = [packing.rows(number) for number in range(len(paths))]
            if len(parts) == 1 or None in parts:
                stages.append(_Stage((tensor.name,), None, paths, tensor.index, packing))
                continue
            for number, (path, rows) in enumerate(zip(paths, parts, strict=True)):
                stages.append(_Stage((tensor.name,), rows, (path,), tensor.index, packing.part(number)))
    return stages


def _group_size(count: int, nbytes: int) -> int:
    """Returns how many of `count` tensors are staged together: a divisor, so that all groups share compiled code."""
    sizes = [size for size in range(1, count + 1) if count % size == 0 and size * nbytes <= _GROUP_BYTES]
    return max(sizes, default=1)


def _read(tensors: TensorDirectory, mesh: Mesh, stage: _Stage) -> jax.Array:
    """Returns what a stage reads as it is in the files, divided over as many devices as divide its rows.

    A stage of experts has a first dimension of one entry a tensor, which is divided first.
    """
    grouped = len(stage.index) == 2
    shape = (len(stage.names), *stage.packing.shape) if grouped else stage.packing.shape
    spec = _row_axes(mesh, shape[: 2 if grouped else 1])
    offset = stage.rows[0] if stage.rows else 0
    read: dict[tuple, np.ndarray] = {}

    def rows(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(part.indices(size)[:2] for part, size in zip(index, shape[: len(spec)], strict=False))
        if key not in read:  # devices that hold a copy of the same rows share one read
            *experts, (first, stop) = key
            names = stage.names[slice(*experts[0])] if grouped else stage.names
            parts = [tensors.read(name, offset + first, stop - first) for name in names]
            read[key] = np.stack(parts) if grouped else parts[0]
        return read[key]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(*spec)), rows)


@functools.lru_cache(maxsize=256)
def _zeros(sharding: NamedSharding, dtype, shape: tuple[int, ...]) -> Callable[[], jax.Array]:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def _mover(layouts: tuple, packing: Packing) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    def move(x):
        return tuple(packing.cut(x, number).astype(dtype) for number, (_, dtype) in enumerate(layouts))

    return jax.jit(move, out_shardings=tuple(sharding for sharding, _ in layouts))


@functools.lru_cache(maxsize=256)
def _inserter(layouts: tuple, packing: Packing) -> Callable[..., tuple[jax.Array, ...]]:
    def insert(stacks, x, index):
        filled = []
        for number, stack in enumerate(stacks):
            part = packing.cut(x, number).astype(stack.dtype)
            start = [*index, *[0] * (stack.ndim - len(index))]
            filled.append(jax.lax.dynamic_update_slice(stack, part[None], start))
        return tuple(filled)

    return jax.jit(insert, out_shardings=tuple(sharding for sharding, _ in layouts), donate_argnums=0)


def _row_axes(mesh: Mesh, sizes: Sequence[int]) -> list[tuple[str, ...] | None]:
    """Returns for each dimension the mesh axes, of those that are left, that divide it into the most parts."""
    free = [name for name, size in mesh.shape.items() if size > 1]
    parts = lambda choice: math.prod(mesh.shape[name] for name in choice)  # noqa: E731
    chosen = []
    for size in sizes:
        choices = [choice for count in range(len(free) + 1) for choice in itertools.combinations(free, count)]
        best = max((choice for choice in choices if size % parts(choice) == 0), key=parts)
        free = [name for name in free if name not in best]
        chosen.append(best or None)
    return chosen
