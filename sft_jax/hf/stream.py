"""Streaming the tensors of a checkpoint into the shards of a decoder's parameters.

The host never holds more than a tensor: each process reads its share of a tensor's rows, one contiguous byte range a
device, and one jitted function transposes, casts and lays it out into its place of the stacked parameter, which is
donated and updated in place. So a process reads 1/n of the checkpoint whatever the layout is.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.hf.files import TensorDirectory
from sft_jax.hf.rules import Piece


def stream_parameter(
    tensors: TensorDirectory, mesh: Mesh, like: jax.ShapeDtypeStruct, parts: Sequence[Piece], dtype: jnp.dtype
) -> jax.Array:
    """Returns one parameter, whole or as a stack of tensors, with the shape and sharding of `like`."""
    transpose = parts[0].transpose
    if parts[0].index is None:
        move = _mover(like.sharding, dtype, transpose)
        return move(_stage(tensors, mesh, parts[0].name)).block_until_ready()
    stack = _zeros(like.sharding, dtype, like.shape)()
    insert = _inserter(like.sharding, dtype, transpose)
    for part in parts:
        stack = insert(stack, _stage(tensors, mesh, part.name), np.int32(part.index))
        stack.block_until_ready()  # so that the host holds one tensor at a time
    return stack


def _stage(tensors: TensorDirectory, mesh: Mesh, name: str) -> jax.Array:
    """Returns a tensor as it is in the file, its rows divided over as many devices as divide them."""
    shape = tensors.tensors[name].shape
    read: dict[tuple[int, int], np.ndarray] = {}

    def rows(index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[0].indices(shape[0])
        if (first, stop) not in read:  # devices that hold a copy of the same rows share one read
            read[first, stop] = tensors.read(name, first, stop - first)
        return read[first, stop]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(_row_axes(mesh, shape[0]))), rows)


@functools.lru_cache(maxsize=256)
def _zeros(sharding: NamedSharding, dtype, shape: tuple[int, ...]) -> Callable[[], jax.Array]:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def _mover(sharding: NamedSharding, dtype, transpose: bool) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: (x.T if transpose else x).astype(dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=256)
def _inserter(sharding: NamedSharding, dtype, transpose: bool) -> Callable[..., jax.Array]:
    def insert(stack, x, index):
        return jax.lax.dynamic_update_index_in_dim(stack, (x.T if transpose else x).astype(dtype), index, 0)

    return jax.jit(insert, out_shardings=sharding, donate_argnums=0)


def _row_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | None:
    """Returns the mesh axes that divide `rows` into the most parts."""
    axes = [name for name, size in mesh.shape.items() if size > 1]
    choices = [choice for count in range(len(axes) + 1) for choice in itertools.combinations(axes, count)]
    parts = lambda choice: math.prod(mesh.shape[name] for name in choice)  # noqa: E731
    return max((choice for choice in choices if rows % parts(choice) == 0), key=parts) or None
