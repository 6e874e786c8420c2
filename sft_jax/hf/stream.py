"""Streaming the tensors of a checkpoint into the shards of a decoder's parameters.

The host never holds more than a tensor: each process reads its share of a tensor's rows, one contiguous byte range a
device, and one jitted function cuts, transposes, casts or quantises and lays it out into its place of the stacked
parameter, which is donated and updated in place. So a process reads 1/n of the checkpoint whatever the layout is.
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

from sft_jax.hf.files import TensorDirectory, TensorInfo
from sft_jax.hf.fingerprint import Checksums, checksums_of_bits
from sft_jax.hf.rules import Packing, Stored
from sft_jax.model.quant import KERNEL_FORMATS

_GROUP_BYTES = 1 << 28  # tensors of experts that are staged together


class _Stage(NamedTuple):
    """What is read at once: a tensor, the rows of it that are one part, or equal tensors of neighbouring experts."""

    names: tuple[str, ...]
    rows: tuple[int, int] | None  # (first, count); None = all
    paths: tuple[str, ...]
    index: tuple[int, ...]  # of the first tensor
    packing: Packing  # of what is read of each tensor
    dtype: np.dtype  # in the files

    @property
    def nbytes(self) -> int:
        return len(self.names) * math.prod(self.packing.shape) * self.dtype.itemsize


def stream_parameters(
    tensors: TensorDirectory,
    mesh: Mesh,
    stored: Sequence[Stored],
    like: Mapping[str, jax.ShapeDtypeStruct],
    dtypes: Mapping[str, jnp.dtype],
    sums: Checksums,
    progress: Callable[[int, int], None] | None = None,
    stored_as: str = "",
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the path and the array of each parameter as soon as it is filled, with the shape and sharding of `like`.

    A kernel of which `like` has codes and scales instead is quantised to `stored_as` tensor by tensor, from the numbers
    in the file: its dtype in `dtypes` has no effect.

    The checksums of the tensors, as they are in the files, go into `sums`. `progress` is called with the bytes that are
    in their place, of all processes together, and how many there are. Of several processes all must walk through this,
    in step.
    """
    stages = _plan(stored, tensors.tensors)
    done, total = 0, sum(tensors.tensors[tensor.name].nbytes for tensor in stored)
    left = Counter(path for stage in stages for path in stage.paths)
    filling: dict[str, tuple[jax.Array, ...]] = {}
    for stage in stages:
        staged = _read(tensors, mesh, stage)
        first = 0 if stage.rows is None else stage.rows[0] * math.prod(stage.packing.shape[1:])
        sums.add(stage.names, checksums_of_bits(mesh, staged, len(stage.index) == 2, first))
        held = {path: _held_as(path, like) for path in stage.paths}
        layouts = tuple(_layout([like[name] for name in held[path]], dtypes[path], stored_as) for path in stage.paths)
        if not stage.index:
            filled = _mover(layouts, stage.packing, stage.dtype)(staged)
        else:
            for path, layout in zip(stage.paths, layouts, strict=True):
                if path not in filling:
                    filling[path] = tuple(_zeros(*parts)() for parts in zip(*layout[:3], strict=True))
            stacks = tuple(filling.pop(path) for path in stage.paths)
            filled = _inserter(layouts, stage.packing, stage.dtype)(stacks, staged, np.asarray(stage.index, np.int32))
        filling.update(zip(stage.paths, filled, strict=True))
        jax.block_until_ready(filled)  # so that there is one stage at a time
        done += staged.nbytes
        del staged, filled
        if progress is not None:
            progress(done, total)
        for path in stage.paths:
            left[path] -= 1
            if not left[path]:
                yield from zip(held[path], filling.pop(path), strict=True)


class _Layout(NamedTuple):
    """How a parameter is held: in one array, or in codes and scales. Equal for equal ones, which share compiled code."""

    shardings: tuple[NamedSharding, ...]
    dtypes: tuple[np.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    stored_as: str  # "" = one array


def _held_as(path: str, like: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[str, ...]:
    """Returns the paths of the arrays that hold a parameter."""
    return (path,) if path in like else (f"{path}.codes", f"{path}.scales")


def _layout(like: Sequence[jax.ShapeDtypeStruct], dtype: jnp.dtype, stored_as: str) -> _Layout:
    shardings, shapes = tuple(array.sharding for array in like), tuple(array.shape for array in like)
    if len(like) == 1:
        return _Layout(shardings, (jnp.dtype(dtype),), shapes, "")
    return _Layout(shardings, tuple(array.dtype for array in like), shapes, stored_as)


def _plan(stored: Sequence[Stored], infos: Mapping[str, TensorInfo]) -> list[_Stage]:
    """Returns what is read, in an order in which a parameter is full before the next one is begun, large ones first.

    The same in every process, since it follows from the model alone and not from how the files are cut.
    """
    together: dict[str, list[Stored]] = {}
    for tensor in stored:
        together.setdefault(tensor.paths[0], []).append(tensor)
    planned = [_plan_parameters(tensors, infos) for tensors in together.values()]
    # At the end, when most of the model is there, what is held beside it is small.
    planned.sort(key=lambda stages: -max(stage.nbytes for stage in stages))
    return [stage for stages in planned for stage in stages]


def _plan_parameters(tensors: Sequence[Stored], infos: Mapping[str, TensorInfo]) -> list[_Stage]:
    """Returns the stages of the parameters that these tensors fill."""
    alike = lambda tensor: (tensor.paths, tensor.index[:1], tensor.packing, infos[tensor.name].dtype)  # noqa: E731
    stages = []
    ordered = sorted(tensors, key=lambda tensor: tensor.index)
    for (paths, _, packing, dtype), group in itertools.groupby(ordered, key=alike):
        members = list(group)
        if len(members[0].index) == 2:
            size = _group_size(len(members), infos[members[0].name].nbytes)
            for start in range(0, len(members), size):
                names = tuple(tensor.name for tensor in members[start : start + size])
                stages.append(_Stage(names, None, paths, members[start].index, packing, dtype))
            continue
        for tensor in members:
            parts = [packing.rows(number) for number in range(len(paths))]
            if len(parts) == 1 or None in parts:
                stages.append(_Stage((tensor.name,), None, paths, tensor.index, packing, dtype))
                continue
            for number, (path, rows) in enumerate(zip(paths, parts, strict=True)):
                stages.append(_Stage((tensor.name,), rows, (path,), tensor.index, packing.part(number), dtype))
    return stages


def _group_size(count: int, nbytes: int) -> int:
    """Returns how many of `count` tensors are staged together: a divisor, so that all groups share compiled code."""
    sizes = [size for size in range(1, count + 1) if count % size == 0 and size * nbytes <= _GROUP_BYTES]
    return max(sizes, default=1)


def _read(tensors: TensorDirectory, mesh: Mesh, stage: _Stage) -> jax.Array:
    """Returns the bits of what a stage reads, divided over as many devices as divide its rows.

    As whole numbers, because these are moved as they are on every platform, where a CPU widens 16-bit floats. A stage of
    experts has a first dimension of one entry a tensor, which is divided first.
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
            parts = [tensors.read(name, offset + first, stop - first).view(_bits(stage.dtype)) for name in names]
            read[key] = np.stack(parts) if grouped else parts[0]
        return read[key]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(*spec)), rows)


@functools.lru_cache(maxsize=256)
def _zeros(sharding: NamedSharding, dtype, shape: tuple[int, ...]) -> Callable[[], jax.Array]:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


def _bits(dtype: np.dtype) -> np.dtype:
    """Returns the unsigned integers of the same size."""
    return np.dtype(f"u{dtype.itemsize}")


def _held(bits: jax.Array, stored: np.dtype, layout: _Layout) -> tuple[jax.Array, ...]:
    """Returns the arrays that hold what these are the bits of."""
    numbers = jax.lax.bitcast_convert_type(bits, stored)
    if layout.stored_as:
        return KERNEL_FORMATS[layout.stored_as].quantise(numbers.astype(jnp.float32))
    return (numbers.astype(layout.dtypes[0]),)


# What these return and take is a tuple of arrays for each parameter.
@functools.lru_cache(maxsize=256)
def _mover(layouts: tuple[_Layout, ...], packing: Packing, stored: np.dtype) -> Callable:
    def move(bits):
        parts = [_held(packing.cut(bits, number), stored, layout) for number, layout in enumerate(layouts)]
        return tuple(tuple(map(_filled_up, part, layout.shapes)) for part, layout in zip(parts, layouts, strict=True))

    return jax.jit(move, out_shardings=tuple(layout.shardings for layout in layouts))


def _filled_up(part: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns `part` with zeros behind it: a parameter may have more rows than the vocabulary has tokens."""
    return jnp.pad(part, [(0, size - own) for size, own in zip(shape, part.shape, strict=True)])


@functools.lru_cache(maxsize=256)
def _inserter(layouts: tuple[_Layout, ...], packing: Packing, stored: np.dtype) -> Callable:
    def into(stack, part, index):
        start = [*index, *[0] * (stack.ndim - len(index))]
        return jax.lax.dynamic_update_slice(stack, part[None], start)

    def insert(stacks, bits, index):
        filled = []
        for number, (stack, layout) in enumerate(zip(stacks, layouts, strict=True)):
            parts = _held(packing.cut(bits, number), stored, layout)
            filled.append(tuple(into(*pair, index) for pair in zip(stack, parts, strict=True)))
        return tuple(filled)

    return jax.jit(insert, out_shardings=tuple(layout.shardings for layout in layouts), donate_argnums=0)


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
