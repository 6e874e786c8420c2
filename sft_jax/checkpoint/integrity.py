"""Checksums of arrays that are the same on every mesh, so that a damaged checkpoint is noticed.

The sum over all elements of `mix(bits, index)` modulo 2**32 does not depend on the order of the additions, so any
sharding gives the same number. `mix` is a bijection of the bits for a fixed index: a change of one element always
changes the sum, and a swap of two elements changes it with probability 1 - 2**-32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Returns the checksum of every array, computed where the array lies."""
    # One at a time: on CPU devices, programs that wait for other devices share their threads, and many of them in flight
    # can wait for each other for ever.
    return {name: int(jax.device_get(_checksum_on(array))) for name, array in arrays.items()}


def _checksum_on(array: jax.Array) -> jax.Array:
    sharding = getattr(array, "sharding", None)
    # Replicated, so that every process of a run with several can read it.
    out = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return _compiled(out)(array)


@functools.cache
def _compiled(out: NamedSharding | None):
    return jax.jit(checksum, out_shardings=out)


def checksum(array: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """Returns the uint32 checksum of one array of any shape and any dtype of 1, 2 or 4 bytes.

    `first` is the number of the first element, where the array is a range of rows of a larger one: the checksum of that
    is the sum of those of its parts, modulo 2**32.
    """
    width = array.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(array.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    index += jnp.asarray(first, jnp.uint32)
    return jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of 32 bits in which each input bit flips half of the output's."""
    x ^= x >> 16
    x *= jnp.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
