"""Means over seeds and what may be said of them: Student's t, without a library of statistics."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over runs."""

    mean: float
    low: float | None  # of the t interval; None for a single run, of which nobody knows how far another would be
    high: float | None
    deviation: float | None  # between runs, with n - 1
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of the values of some runs with its 95 % t interval."""
    values = np.asarray(values, np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean, None, None, None, count)
    deviation = float(values.std(ddof=1))
    half = t_quantile((1 + LEVEL) / 2, count - 1) * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, deviation, count)


def differ(a: Estimate, b: Estimate) -> bool | None:
    """Returns whether two means differ by Welch's t test (1947) at 5 %, or None where one of them is of a single run.

    Deviations need not be alike: a rate that is too high is noisier than one that is right.
    """
    if a.deviation is None or b.deviation is None:
        return None
    parts = a.deviation**2 / a.count, b.deviation**2 / b.count
    variance = sum(parts)
    if variance == 0:
        return a.mean != b.mean
    freedom = variance**2 / (parts[0] ** 2 / (a.count - 1) + parts[1] ** 2 / (b.count - 1))
    return abs(a.mean - b.mean) > t_quantile((1 + LEVEL) / 2, max(1, math.floor(freedom))) * math.sqrt(variance)


def t_quantile(probability: float, freedom: int) -> float:
    """Returns the quantile, above the median, of Student's t with a whole number of degrees of freedom.

    By bisection of the exact distribution function (Abramowitz & Stegun 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _t_two_sided(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _t_two_sided(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_two_sided(t: float, freedom: int) -> float:
    """Returns P(|T| < t)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for number in range(2 + odd, freedom - 1, 2):  # coefficients 2/3, 4/5, ... or 1/2, 3/4, ...
        term *= cosine**2 * (number - 1) / number
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
