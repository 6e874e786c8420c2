"""Mixture: which documents of which set an epoch holds.

A weight is a share of documents. An epoch of a mixture is round(w_i N) documents of set i, N being the documents of
all sets together. Without weights an epoch is every document of every set once, or as often as the set's `epochs` says:
2 is twice, 0.5 every document in every second epoch. However many an epoch takes, each set is walked through a
permutation of its own, without repeats until it is exhausted; then a new permutation begins.

With `data.weight_by` = "supervised_tokens" a weight is a share of supervised tokens: an epoch has about as many as all
sets together, and takes so many documents of a set that, at the set's mean per document, its share comes out. What a
document is, is decided before: pieces that the over-length policy "split" makes of an example count each on its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sft_jax.data.randomness import derive_key, permutation


@dataclass(frozen=True)
class Mixture:
    """Documents are numbered over all sets: set i holds the numbers [sum(sizes[:i]), sum(sizes[:i + 1]))."""

    sizes: tuple[int, ...]  # documents of each set
    counts: tuple[int | Fraction, ...]  # documents that an epoch takes of each set, at least 1; of a fraction e epochs
    #                                     take ceil(e * count), so over many it is exact
    seed: int = 0
    shuffle: bool = True

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the documents of epoch number `epoch`, set after set, int64 [sum(counts)]."""
        parts, base = [], 0
        for index, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            first, stop = math.ceil(epoch * count), math.ceil((epoch + 1) * count)
            parts.append(base + self._walk(index, size, first, stop - first))
            base += size
        return np.concatenate(parts)

    def _walk(self, index: int, size: int, first: int, count: int) -> np.ndarray:
        """Returns the elements first .. first + count of the endless walk through the permutations of one set."""
        passes = range(first // size, (first + count - 1) // size + 1)
        if self.shuffle:
            walks = [permutation(derive_key(self.seed, "mixture", index, number), size) for number in passes]
        else:
            walks = [np.arange(size)] * len(passes)
        begin = first - passes[0] * size
        return np.concatenate(walks)[begin : begin + count]


def make_mixture(
    sizes: Sequence[int],
    weights: Sequence[float | None],
    seed: int = 0,
    shuffle: bool = True,
    amounts: Sequence[int] | None = None,
    epochs: Sequence[float | None] | None = None,
) -> Mixture:
    """Returns the mixture of sets with `sizes` documents and `weights` (all None, or all above 0; normalised here).

    `amounts` is what each set holds of that which weights are shares of, documents by default. A set with a weight is
    never left out: an epoch takes at least one document of it. Without weights, `epochs` says how often each set comes
    up, None for once; it gives at least one document an epoch.

    >>> make_mixture([900, 100], [1.0, 1.0]).counts
    (500, 500)
    >>> make_mixture([900, 100], [1.0, 1.0], amounts=[9000, 9000]).counts
    (900, 100)
    >>> make_mixture([900, 100], [None, None], epochs=[None, 2.5]).counts
    (900, 250)
    """
    if len(sizes) != len(weights) or any((weight is None) != (weights[0] is None) for weight in weights):
        raise ValueError(f"weights must be given for all sets or for none: {weights}")
    if min(sizes) < 1:
        raise ValueError(f"a set has no documents: {tuple(sizes)}")
    if weights[0] is None:
        counts = tuple(documents_an_epoch(*pair) for pair in zip(sizes, epochs or [None] * len(sizes), strict=True))
        if min(counts) < 1:
            raise ValueError(f"an epoch has less than one document of a set: {counts}")
    elif any(epochs or ()):
        raise ValueError(f"weights {weights} and epochs {epochs} cannot both be given")
    else:
        # Exact: how Python adds floats depends on its version, and a half could be rounded either way.
        exact = [Fraction(weight) for weight in weights]
        amounts = [int(amount) for amount in (sizes if amounts is None else amounts)]
        shares = [sum(amounts) * weight / sum(exact) for weight in exact]
        counts = tuple(
            max(1, round(share * size / amount)) for share, size, amount in zip(shares, sizes, amounts, strict=True)
        )
    return Mixture(tuple(int(size) for size in sizes), counts, seed, shuffle)


def documents_an_epoch(size: int, epochs: float | None) -> int | Fraction:
    """Returns how many documents an epoch takes of a set of `size` that comes up `epochs` times, None for once.

    The number is taken as the decimal that was written: 0.1 is a tenth, and not the binary fraction a little above it.

    >>> documents_an_epoch(3, 0.5), documents_an_epoch(30, 0.1)
    (Fraction(3, 2), 3)
    """
    count = size * (1 if epochs is None else Fraction(repr(float(epochs))))
    return int(count) if Fraction(count).denominator == 1 else count
