"""How far a score would move with other answers of the same kind: bootstrap intervals (Efron 1987, BCa), Wilson's where all answers are alike."""

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_NORMAL = NormalDist()
_BLOCK = 1 << 22  # numbers of a block of resamples, which bounds memory


class Interval(NamedTuple):
    low: float
    high: float


def unseen_share(count: int, level: float = LEVEL) -> float:
    """Returns what the share of a kind of answer may be that none of `count` is: the upper end of Wilson's score interval (1927).

    >>> round(unseen_share(64), 3)
    0.057
    """
    square = _NORMAL.inv_cdf((1 + level) / 2) ** 2
    return square / (count + square)


def share_interval(statistics: np.ndarray) -> Interval | None:
    """Returns the interval of a mean of answers that are all 1, or all 0, where no resample differs: Wilson's score interval.

    None where they are something else, or are fewer than two. `statistics` [n, 2] are as `ratio` takes them.
    """
    if len(statistics) < 2 or np.any(statistics[:, 1] != 1) or np.any(statistics[:, 0] != statistics[0, 0]):
        return None
    unseen = unseen_share(len(statistics))
    return {0.0: Interval(0.0, unseen), 1.0: Interval(1 - unseen, 1.0)}.get(float(statistics[0, 0]))


def interval(
    statistics: np.ndarray,
    value: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Returns the bias-corrected and accelerated bootstrap interval of value(sum of statistics) over the rows.

    Args:
        statistics: float64 [n, k], of each answer or document; those are resampled.
        value: sums [..., k] -> values [...].
        seed: of the resamples: the same statistics give the same interval.

    Returns:
        None where there are fewer than two rows, or the value of a resample is not a number. Where all resamples agree,
        the interval is that number.
    """
    count = len(statistics)
    if count < 2:
        return None
    statistics = np.asarray(statistics, np.float64)
    rng = np.random.default_rng(seed)
    total = statistics.sum(axis=0)
    blocks, left = [], resamples
    while left:
        rows = min(left, max(_BLOCK // count, 1))
        times = rng.multinomial(count, np.full(count, 1 / count), size=rows)  # how often each row is in each resample
        blocks.append(value(times @ statistics))
        left -= rows
    drawn, whole = np.sort(np.concatenate(blocks)), float(value(total))
    if not np.isfinite(drawn).all() or not np.isfinite(whole):
        return None
    if drawn[0] == drawn[-1]:
        return Interval(float(drawn[0]), float(drawn[0]))
    below = (np.count_nonzero(drawn < whole) + np.count_nonzero(drawn <= whole)) / 2 / resamples
    bias = _NORMAL.inv_cdf(min(max(below, 1 / resamples), 1 - 1 / resamples))
    without = value(total - statistics)  # the jackknife: each row left out
    without = without[np.isfinite(without)]
    away = without.mean() - without if len(without) else np.zeros(1)
    spread = float(np.sum(away**2)) ** 1.5
    acceleration = float(np.sum(away**3)) / (6 * spread) if spread > 0 else 0.0
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + _NORMAL.inv_cdf(tail)
        place = _NORMAL.cdf(bias + shifted / (1 - acceleration * shifted))
        ends.append(float(np.quantile(drawn, place)))
    return Interval(*ends)
