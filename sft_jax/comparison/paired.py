"""Whether one contender is better than another on the same answers: tests and intervals of paired differences.

Letters: N answers that count for both, k statistics of an answer (see `sft_jax.evaluation.scoring`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sft_jax.evaluation.bootstrap import Interval, interval, unseen_share
from sft_jax.evaluation.scoring import Scored, ratio

ALPHA = 0.05
POWER = 0.8
FLIPS = 10_000  # random ones, where all are too many
_MOST_EXACT = 14  # answers that differ, of which all 2^n ways to swap are looked at
_BLOCK = 1 << 22  # numbers of a block of swaps, which bounds memory
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Pair:
    """The first of two contenders against the second, by one scorer."""

    difference: float  # of the scores, over the answers that count for both; above 0 the first is better
    interval: Interval | None  # of the difference, at 95 %
    p: float  # two-sided; not corrected for other pairs
    exact: bool  # whether `p` is of all ways to swap answers, not of random ones
    wins: int  # answers that score higher for the first by themselves
    losses: int
    ties: int
    spread: float  # standard deviation of what an answer adds to the difference
    answers: int


def compare_pair(first: Scored, second: Scored, seed: int = 0) -> Pair | None:
    """Returns what the answers of two contenders to the same prompts say; None where no answer counts for both.

    The test swaps the two answers to a prompt, which changes nothing if neither contender is better: for a mean this is the
    sign-flip permutation test of the mean difference, for BLEU and chrF approximate randomisation (Riezler & Maxwell 2005).
    All ways to swap are looked at where few answers differ or all differ by as much (for right and wrong answers that is
    McNemar's exact test), else FLIPS random ones. The interval resamples prompts with both answers (Efron 1987, BCa); that of right
    and wrong answers that differ alike on all prompts is `_alike`.
    """
    scorer = first.scorer
    both = np.array([scorer.counts(a) and scorer.counts(b) for a, b in zip(first.statistics, second.statistics, strict=True)], bool)
    if not both.any():
        return None
    a, b = first.statistics[both], second.statistics[both]
    size = a.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return scorer.value(sums[..., :size]) - scorer.value(sums[..., size:])

    together = np.concatenate([a, b], axis=1)
    p, exact = _swap_test(a, b, scorer.value, seed)
    each = np.array(first.select(both).of_each(), float) - np.array(second.select(both).of_each(), float)
    total = together.sum(axis=0)
    seen = float(difference(total))
    spread = math.nan
    if len(a) > 1:
        without = difference(total - together)  # the jackknife: for a mean this is the standard deviation of the differences
        spread = float(np.std((len(a) - 1) * (seen - without), ddof=1)) if np.isfinite(without).all() else math.nan
    ends = _alike(a, b) if scorer.value is ratio else None
    return Pair(
        seen, ends or interval(together, difference, seed=seed), p, exact, int((each > 0).sum()), int((each < 0).sum()), int((each == 0).sum()),
        spread, len(a),
    )  # fmt: skip


def _alike(a: np.ndarray, b: np.ndarray) -> Interval | None:
    """Returns the interval of the difference of right and wrong answers where every prompt has the same one, which no resample changes.

    The share of prompts with another difference is at most Wilson's bound; each of them moves it by 1 from a tie, else by up to 2.
    None where prompts differ, where answers are anything else, or where there are fewer than two.
    """
    both = np.concatenate([a, b])
    change = a[0, 0] - b[0, 0]
    if len(a) < 2 or np.any(both[:, 1] != 1) or not np.isin(both[:, 0], (0.0, 1.0)).all() or np.any(a[:, 0] - b[:, 0] != change):
        return None
    width = unseen_share(len(a)) * (2 if change else 1)
    return Interval(float(max(change - width, -1)), float(min(change + width, 1)))


def _swap_test(a: np.ndarray, b: np.ndarray, value, seed: int) -> tuple[float, bool]:
    """Returns (two-sided p, whether it is exact) of the difference value(sum a) - value(sum b) under swaps of rows."""
    total, steps = a.sum(axis=0) + b.sum(axis=0), a - b
    steps = steps[np.any(steps != 0, axis=1)]
    if not len(steps):
        return 1.0, True

    def at_least(swapped: np.ndarray) -> np.ndarray:  # sums of a, float64 [m, k], after swaps
        found = np.abs(value(swapped) - value(total - swapped))
        return found >= observed - 1e-9 * max(1.0, observed)

    start = a.sum(axis=0)
    observed = float(np.abs(value(start) - value(total - start)))
    alike = steps[0] * np.where(np.all(steps == steps[0], axis=1), 1, -1)[:, None]
    if np.array_equal(alike, steps):  # which of them are swapped does not matter, only how many of each sign
        count, forward = len(steps), int(np.all(steps == steps[0], axis=1).sum())
        ahead = np.arange(count + 1)[:, None]  # rows that are a step ahead after swaps
        reached = at_least(start + (ahead - forward) * steps[0])
        factorials = np.array([math.lgamma(number + 1) for number in range(count + 1)])
        shares = np.exp(factorials[-1] - factorials - factorials[::-1] - count * math.log(2))  # binomial, of each number of rows
        return min(float(shares[reached].sum()), 1.0), True
    if len(steps) <= _MOST_EXACT:
        sums = start[None]
        for step in steps:
            sums = np.concatenate([sums, sums - step])
        return float(at_least(sums).mean()), True
    rng, reached, left = np.random.default_rng(seed), 0, FLIPS
    while left:
        rows = min(left, max(_BLOCK // len(steps), 1))
        swaps = rng.integers(0, 2, (rows, len(steps))).astype(np.float64)
        reached += int(at_least(start - swaps @ steps).sum())
        left -= rows
    return (1 + reached) / (1 + FLIPS), False


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm 1979): with each below alpha, no one of all is false with 1 - alpha.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, float)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


def rows_needed(difference: float, spread: float, pairs: int = 1) -> int | None:
    """Returns how many answers would show a difference with POWER at ALPHA / pairs, two-sided; None where there is none.

    By the normal approximation: ((z(1 - alpha / 2) + z(power)) * spread / difference)^2. It is never fewer than those of which all
    have to differ in the same direction, since a permutation test of n answers gives no p below 2^(1 - n).
    """
    if not difference or not math.isfinite(spread):
        return None
    quantiles = _NORMAL.inv_cdf(1 - ALPHA / pairs / 2) + _NORMAL.inv_cdf(POWER)
    return max(math.floor(2 + math.log2(pairs / ALPHA)), math.ceil((quantiles * spread / difference) ** 2))
