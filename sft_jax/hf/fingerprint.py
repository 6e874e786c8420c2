"""A fingerprint of a model's tensors, by which an adapter knows the base that it belongs to.

It is made of names, shapes, dtypes and checksums as they are in the files, so it does not depend on the mesh, on how the
files are cut, on the dtype that the model is given while it is loaded, or on the prefix that its names have.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.checkpoint.integrity import checksum


class Checksums:
    """The checksums of tensors, added up over the parts in which they come; nothing waits for them before `totals`."""

    def __init__(self):
        self._sums: list[tuple[tuple[str, ...], jax.Array]] = []

    def add(self, names: tuple[str, ...], sums: jax.Array) -> None:
        """Takes one number for each of the tensors: what their checksum is, or a part of them adds to it."""
        self._sums.append((names, sums))

    def totals(self) -> dict[str, int]:
        """Returns the checksum of every tensor."""
        totals: dict[str, int] = {}
        values = jax.device_get([sums for _, sums in self._sums])
        for (names, _), sums in zip(self._sums, values, strict=True):
            for name, value in zip(names, sums, strict=True):
                totals[name] = (totals.get(name, 0) + int(value)) % 2**32
        return totals


def fingerprint(arrays: Iterable[tuple[str, Sequence[int], str, int]]) -> str:
    """Returns the fingerprint of arrays of which these are name, shape, dtype and checksum."""
    lines = [f"{name} {list(shape)} {dtype} {value:08x}" for name, shape, dtype, value in arrays]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def random_fingerprint(config: str, seed: int, dtype: str) -> str:
    """Returns the fingerprint of a model that was drawn: what its numbers follow from."""
    return hashlib.sha256(f"random {seed} {dtype} {config}".encode()).hexdigest()


def checksums_of_bits(mesh: Mesh, bits: jax.Array, grouped: bool, first: int) -> jax.Array:
    """Returns, readable in every process, the checksum of each tensor in the first dimension of `bits`.

    Where they are not `grouped`, `bits` is one tensor, or the rows of one from its element `first` on.
    """
    return _of_bits(NamedSharding(mesh, P()), grouped)(bits, np.uint32(first % 2**32))


@functools.lru_cache(maxsize=256)
def _of_bits(out: NamedSharding, grouped: bool) -> Callable[..., jax.Array]:
    def compute(bits, first):
        return jax.vmap(checksum)(bits) if grouped else checksum(bits, first)[None]

    return jax.jit(compute, out_shardings=out)
