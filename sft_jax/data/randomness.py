"""Random bits that are a pure function of (key, counter) and of nothing else.

The order of training rows is part of a checkpoint, so it may not depend on the version of a library. numpy promises
stable bit streams for its generators but not for `permutation` or `shuffle`, and seeding goes through a hash of its
own. SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) is five integer
operations, counter-based, and passes BigCrush; a permutation is the stable order of its outputs.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_key(*parts: int | str) -> int:
    """Returns a 64-bit key for a purpose, such as `derive_key(seed, "rows", epoch)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int, count: int) -> np.ndarray:
    """Returns the first `count` 64-bit outputs of SplitMix64 with the state `key`, uint64 [count].

    >>> random_bits(1234567, 2)
    array([ 6457827717110365317,  3203168211198807973], dtype=uint64)
    """
    state = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN  # wraps modulo 2**64
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def permutation(key: int, count: int) -> np.ndarray:
    """Returns a permutation of range(count), int64 [count]. Equal outputs keep their order, so it is unique."""
    return np.argsort(random_bits(key, count), kind="stable")
