"""A power law with an offset through measured values: L(n) = a + b * n^-c, as learning curves follow (Hestness et al.,
arXiv:1712.00409), fitted robustly, many curves at a time, so that a bootstrap is as quick as one fit.

For a given c the law is linear in a and b, so c alone is searched, over all of its range; there are no local minima to be
caught in. Sizes are given as shares of the largest, so that b is the distance from the limit at the largest.

Letters: R curves at a time, N runs of one, K values of c.
"""

from typing import NamedTuple

import numpy as np

EXPONENTS = 0.05, 4.0  # that c is looked for in: outside, five sizes within a factor of 16 show a straight line or a step
_COARSE, _FINE, _ZOOMS = 24, 7, 5
_ROUNDS = 4  # of weights that follow from the fit before
_HUBER = 1.5  # standard deviations from which on a run counts less (Huber 1964)
_LEAST_SHARE = 1e-3  # of the largest value: what relative errors are taken of at least


class Law(NamedTuple):
    """Power laws of sizes that are shares of the largest."""

    offset: np.ndarray  # a [R]: the value with endless data
    slope: np.ndarray  # b [R]
    exponent: np.ndarray  # c [R]

    def at(self, sizes: np.ndarray) -> np.ndarray:
        """Returns the values [R, S] at sizes [S]."""
        return self.offset[:, None] + self.slope[:, None] * sizes[None] ** -self.exponent[:, None]


class Fit(NamedTuple):
    """Fitted laws and what the runs scatter around them."""

    law: Law
    scale: np.ndarray  # [R], standard deviation of a run, relative to the law's value where errors are


def fit(sizes: np.ndarray, values: np.ndarray, *, relative: bool, floor: float | None = None) -> Fit:
    """Fits a law to each row of values.

    Args:
        sizes: float64 [N], shares of the largest, in (0, 1]; at least three different ones, and N at least 4.
        values: float64 [R, N].
        relative: errors are shares of the value, as those of a loss are, which a run of little data has more of.
        floor: what a is at least; None is no limit.
    """
    values = np.asarray(values, np.float64)
    weights, fitted = np.ones_like(values), np.maximum(values, _LEAST_SHARE * np.abs(values).max(axis=1, keepdims=True))
    for number in range(_ROUNDS):
        by = fitted if relative else np.ones_like(values)
        law = _search(sizes, values, weights / by**2, floor)
        predicted = law.at(sizes)
        if relative:
            fitted = np.maximum(predicted, _LEAST_SHARE * np.abs(values).max(axis=1, keepdims=True))
            by = fitted
        errors = (values - predicted) / by
        scale = np.sqrt((weights * errors**2).sum(axis=1) / (len(sizes) - 3))
        if number < _ROUNDS - 1:
            middle = np.maximum(1.4826 * np.median(np.abs(errors), axis=1), 1e-12) * np.sqrt(len(sizes) / (len(sizes) - 3))
            weights = np.minimum(1.0, _HUBER / np.maximum(np.abs(errors) / middle[:, None], 1e-12))
    return Fit(law, scale)


def _search(sizes: np.ndarray, values: np.ndarray, weights: np.ndarray, floor: float | None) -> Law:
    """Returns the laws with the least weighted squares; c by a grid that is made finer around the best one."""
    low, high = np.log(EXPONENTS)
    grid = np.broadcast_to(np.linspace(low, high, _COARSE), (len(values), _COARSE))
    step = (high - low) / (_COARSE - 1)
    for zoom in range(_ZOOMS):
        offset, slope, lost = _linear(sizes, values, weights, np.exp(grid), floor)
        best = lost.argmin(axis=1)
        chosen = np.take_along_axis(grid, best[:, None], 1)
        if zoom < _ZOOMS - 1:
            grid = np.clip(chosen + step * np.linspace(-1, 1, _FINE), low, high)
            step *= 2 / (_FINE - 1)
    offset, slope = (np.take_along_axis(array, best[:, None], 1)[:, 0] for array in (offset, slope))
    return Law(offset, slope, np.exp(chosen[:, 0]))


def _linear(sizes: np.ndarray, values: np.ndarray, weights: np.ndarray, exponents: np.ndarray, floor: float | None):
    """Returns (a, b, weighted squares), each [R, K], of the best a >= floor and b for each exponent [R, K]."""
    x = sizes[None, None] ** -exponents[..., None]  # [R, K, N]
    w, y = weights[:, None], values[:, None]
    total = w.sum(axis=-1)
    mean_x, mean_y = (w * x).sum(axis=-1) / total, (w * y).sum(axis=-1) / total
    away = x - mean_x[..., None]
    slope = (w * away * (y - mean_y[..., None])).sum(axis=-1) / (w * away**2).sum(axis=-1)
    offset = mean_y - slope * mean_x
    if floor is not None:
        through = (w * x * (y - floor)).sum(axis=-1) / (w * x**2).sum(axis=-1)
        slope, offset = np.where(offset < floor, through, slope), np.maximum(offset, floor)
    lost = (w * (y - offset[..., None] - slope[..., None] * x) ** 2).sum(axis=-1)
    return offset, slope, lost
