"""What a learning curve says: the gain of more data with an interval, and whether it can be told at all.

Intervals are by a parametric bootstrap over runs: the fitted law is taken for the truth, every run is drawn anew around it, the
law is fitted again. The scale of the runs is itself uncertain with so few of them, so each draw has a scale of its own, as in
the derivation of Student's t.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from sft_jax.experiments.power_law import Law, fit
from sft_jax.experiments.statistics import LEVEL, t_quantile

Verdict = Literal["more data helps", "flat", "cannot tell", "more data hurts"]

MULTIPLES = 2, 4
FLAT = 0.05  # share of the metric's value with all data that a gain must be below to be none
_RESAMPLES = 2000
_PARAMETERS = 3
_LIMITS = {"loss": 0.0, "bits_per_byte": 0.0, "perplexity": 1.0, "accuracy": 1.0, "bleu": 100.0, "chrf": 100.0}  # of other scores: 1
_RELATIVE = ("loss", "bits_per_byte", "perplexity")  # whose errors are shares of the value


class Gain(NamedTuple):
    """How much better the metric is expected to be with `multiple` times all data; above 0 is better."""

    multiple: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A fitted learning curve."""

    rows: float  # of training data in a run with all
    lower: bool  # is better
    law: tuple[float, float, float]  # a, b, c of a + b * (rows / all rows)^-c; b below 0 where higher is better
    noise: float  # standard deviation between runs with all data
    gains: list[Gain]
    verdict: Verdict
    why: str
    drawn: Law  # of the bootstrap

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Returns the fitted values at numbers of rows."""
        offset, slope, exponent = self.law
        return offset + slope * (np.asarray(rows) / self.rows) ** -exponent

    def band(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ends of the 95 % intervals of the curve at numbers of rows."""
        low, high = np.quantile(self.drawn.at(np.asarray(rows) / self.rows), _tails(), axis=0)
        return low, high


def limit_of(metric: str, lower: bool, values: Sequence[float]) -> tuple[bool, float | None]:
    """Returns (whether errors of a metric are relative, the best value that it can have), as `learning_curve` takes them.

    A score that is not known is taken to end at 1, unless a value is better or lower ones are.
    """
    name = metric.partition(":")[0]
    if name in _RELATIVE:
        return True, _LIMITS[name]
    limit = _LIMITS.get(name, 1.0)
    return False, None if lower or max(values) > limit else limit


def learning_curve(
    rows: Sequence[float], values: Sequence[float], whole: float, *, lower: bool, relative: bool, limit: float | None, seed: int = 0,
    resamples: int = _RESAMPLES,
) -> Curve:  # fmt: skip
    """Fits the curve of runs with `rows` rows and a metric of `values`, and says what it means.

    Args:
        whole: rows of a run with all data, from which multiples are counted.
        lower: lower values are better.
        relative: see `fit`; limit: the best value that there can be, None where there is none.
        seed: of the draws; the same runs give the same intervals.

    Raises ValueError for fewer than four runs or than three sizes.
    """
    sizes, sign = np.asarray(rows, np.float64) / whole, 1.0 if lower else -1.0
    costs = sign * np.asarray(values, np.float64)  # lower is better
    if len(costs) <= _PARAMETERS or len(set(sizes.tolist())) < _PARAMETERS:
        raise ValueError("a law of three numbers needs four runs of three sizes")
    if len(set(costs.tolist())) == 1:
        return _level(whole, lower, sign * float(costs[0]))
    floor = None if limit is None else sign * limit
    found = fit(sizes, costs[None], relative=relative, floor=floor)
    draws = _draw(sizes, found.law.at(sizes), found.scale[0], relative, seed, resamples)
    drawn = fit(sizes, draws, relative=relative, floor=floor).law
    misfits = _misfit(sizes, draws, drawn.at(sizes), relative)
    share = float(np.mean(misfits >= _misfit(sizes, costs[None], found.law.at(sizes), relative)[0]))
    noise = float(found.scale[0]) * (max(float(found.law.at(np.ones(1))[0, 0]), 0.0) if relative else 1.0)
    gains = [_gain(multiple, found.law, drawn) for multiple in MULTIPLES]
    small = min(noise, FLAT * abs(float(found.law.at(np.ones(1))[0, 0])))
    verdict, why = _verdict(gains[0], small, _trend(sizes, costs, relative), share)
    offset, slope, exponent = (float(part[0]) for part in found.law)
    law = sign * offset, sign * slope, exponent
    return Curve(whole, lower, law, noise, gains, verdict, why, Law(sign * drawn.offset, sign * drawn.slope, drawn.exponent))


def _level(whole: float, lower: bool, value: float) -> Curve:
    """Returns the curve of runs that all have one value: nothing scatters, so there is nothing to fit or to draw."""
    law = Law(np.array([value]), np.zeros(1), np.ones(1))
    gains = [Gain(multiple, 0.0, 0.0, 0.0) for multiple in MULTIPLES]
    return Curve(whole, lower, (value, 0.0, 1.0), 0.0, gains, "flat", f"all runs have the same value, {value:.4g}", law)


def _draw(sizes: np.ndarray, predicted: np.ndarray, scale: float, relative: bool, seed: int, resamples: int) -> np.ndarray:
    """Returns the values [resamples, N] of runs that scatter around `predicted` [1, N]."""
    rng = np.random.default_rng(seed)
    freedom = len(sizes) - _PARAMETERS
    scales = scale * np.sqrt(freedom / rng.chisquare(freedom, (resamples, 1)))
    errors = scales * rng.standard_normal((resamples, len(sizes)))
    return predicted * np.exp(errors) if relative else predicted + errors


def _misfit(sizes: np.ndarray, values: np.ndarray, predicted: np.ndarray, relative: bool) -> np.ndarray:
    """Returns the squares of the mean errors of the sizes over those of runs around these means, [R]: what the F test of lack
    of fit compares. 0 where no size has two runs, which then tell nothing of it."""
    errors = (values - predicted) / (predicted if relative else 1.0)
    between = within = np.zeros(len(values))
    for size in np.unique(sizes):
        own = errors[:, sizes == size]
        mean = own.mean(axis=1)
        between = between + own.shape[1] * mean**2
        within = within + ((own - mean[:, None]) ** 2).sum(axis=1)
    return np.divide(between, within, out=np.zeros_like(between), where=within > 0)


def _gain(multiple: int, law: Law, drawn: Law) -> Gain:
    places = np.array([1.0, multiple])
    gain, gains = (-np.diff(part.at(places), axis=1)[:, 0] for part in (law, drawn))
    low, high = np.quantile(gains, _tails())
    return Gain(multiple, float(gain[0]), float(low), float(high))


def _tails() -> list[float]:
    return [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


def _trend(sizes: np.ndarray, costs: np.ndarray, relative: bool) -> bool:
    """Returns whether the values depend on the logarithm of the size at all, by the t test of a straight line at 5 %."""
    x = np.log(sizes) - np.log(sizes).mean()
    y = np.log(np.maximum(costs, np.finfo(np.float64).tiny)) if relative else costs
    slope = (x * y).sum() / (x**2).sum()
    errors = y - y.mean() - slope * x
    deviation = np.sqrt((errors**2).sum() / (len(x) - 2) / (x**2).sum())
    return bool(abs(slope) > t_quantile((1 + LEVEL) / 2, len(x) - 2) * deviation)


def _verdict(double: Gain, small: float, trend: bool, fits: float) -> tuple[Verdict, str]:
    """Returns what may be said, and by which rule.

    Args:
        small: what a gain is below that is none.
        trend: whether the metric depends on the size at all.
        fits: share of the draws, in which the law is true, that it fits no better.
    """
    if trend and fits < 1 - LEVEL:
        return "cannot tell", (
            f"no such law goes through these sizes: were it true, {fits:.1%} of curves would miss it by as much as these runs do (below 5 % "
            "is a misfit); often the smallest have too few steps to learn at all"
        )
    interval = f"the 95 % interval [{double.low:.4g}, {double.high:.4g}] of the gain of twice the data"
    if -small < double.low and double.high < small:
        return "flat", (
            f"{interval} is within {small:.4g} of 0: one standard deviation between runs with other seeds, and at most {FLAT:.0%} of the value"
        )
    if not trend:
        return "cannot tell", "the metric does not depend on the amount of data by the t test of a straight line over its logarithm (5 %)"
    if double.low > 0:
        return "more data helps", f"{interval} lies above 0"
    if double.high < 0:
        return "more data hurts", f"{interval} lies below 0"
    return "cannot tell", f"{interval} has 0 in it"
