"""A sweep: a grid or a list of settings, each with every seed, and which of them is best by a held-out metric."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_jax.errors import UserError
from sft_jax.evaluation.evals import Between
from sft_jax.experiments.cost import Cost, costs_of
from sft_jax.experiments.engine import Result, check_same_data, run_all
from sft_jax.experiments.metric import Metric, find_metric
from sft_jax.experiments.overrides import Overrides
from sft_jax.experiments.runs import Run, make_runs
from sft_jax.experiments.statistics import Estimate, differ, estimate
from sft_jax.training.platform import set_up_platform
from sft_jax.training.workdir import Workdir

Log = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be run, and what it costs."""

    runs: list[Run]
    costs: list[Cost]
    metric: Metric

    def __str__(self) -> str:
        steps, tokens = sum(cost.steps for cost in self.costs), sum(cost.tokens for cost in self.costs)
        one = {(cost.steps, cost.tokens) for cost in self.costs}
        each = f", {self.costs[0].steps:,} steps and {self.costs[0].tokens:,} tokens each" if len(one) == 1 else ""
        return f"{len(self.runs):,} runs{each}: {steps:,} steps and {tokens:,} tokens in all. They are compared by {self.metric}."


@dataclass(frozen=True)
class Point:
    """The runs of one setting."""

    name: str
    labels: Overrides
    results: list[Result]
    values: list[float]  # of the metric, of those runs that have one
    estimate: Estimate | None  # of the metric; None where no run has a value
    tied: bool | None  # whether it differs from the best by no more than seeds do; None where one seed says nothing of that, or some miss

    @property
    def missing(self) -> int:
        """Runs without a value: what is left may be the luckier seeds."""
        return len(self.results) - len(self.values)


@dataclass(frozen=True)
class Sweep:
    """What has come out."""

    metric: Metric
    results: list[Result]
    points: list[Point]  # the best one first, behind those with all runs those of which some miss; those without a value last
    notes: list[str]

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.summary is None]


def plan_sweep(raw: dict[str, Any], points: Sequence[Overrides], seeds: Sequence[int], metric: str | None, log: Log) -> Plan:
    """Returns the runs of a sweep with their costs; their data are prepared and their models composed.

    Raises UserError for whatever a run would refuse before its first step.
    """
    runs = make_runs(raw, points, seeds)
    found = {find_metric(run.config, metric) for run in runs}
    if len(found) > 1:
        raise UserError(f"--metric: is not the same in all runs ({', '.join(sorted(map(str, found)))}); name one, such as --metric SET/loss.")
    set_up_platform(runs[0].config.train.deterministic)
    return Plan(runs, costs_of(runs, log), found.pop())


def run_sweep(plan: Plan, work: Workdir, retry: bool, log: Log, progress: Between = lambda what, done, total: None) -> Sweep:
    """Runs what is missing of a sweep in its folder and returns all of it; `progress` as in `run_all`.

    Raises UserError where a folder holds another run, and where every run has failed; StoppedBySignal as `run_all`.
    """
    results = run_all(plan.runs, plan.costs, work, retry, log, progress=progress)
    note = check_same_data(results)
    check_some(results)
    return summarise(plan.metric, results, [note] if note else [])


def check_some(results: Sequence[Result]) -> None:
    """Raises UserError where every run has failed."""
    if all(result.summary is None for result in results):
        raise UserError(f"Every run has failed. {results[0].run.name}: {results[0].message} --retry starts them again.")


def summarise(metric: Metric, results: Sequence[Result], notes: Sequence[str] = ()) -> Sweep:
    """Returns the points of the runs of a sweep, sorted, with the ties of the best one."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.run.point, []).append(result)
    points = []
    for name, group in grouped.items():
        values = values_of(group, metric)
        points.append(Point(name, group[0].run.labels, group, values, estimate(values) if values else None, None))
    sign = 1 if metric.lower else -1
    points.sort(key=lambda point: (not point.values, point.missing > 0, sign * point.estimate.mean if point.estimate else 0.0))
    notes = [*notes, *(_missing_note(point, metric) for point in points if point.missing and (point.values or without_value(point.results, metric)))]
    ties = [_tied(points[0], point) for point in points[1:]]
    ranked = [points[0], *(dataclasses.replace(point, tied=None if point.missing else tied) for point, tied in zip(points[1:], ties, strict=True))]
    if len(points) > 1 and all(tied is None for tied in ties):
        notes.append("Nobody knows which differences are noise: there are no two runs of a setting. --seeds=3 tells.")
    return Sweep(metric, list(results), ranked, notes)


def _missing_note(point: Point, metric: Metric) -> str:
    unknown = len(without_value(point.results, metric))
    reasons = {"failed": point.missing - unknown, f"finished with a {metric} that is no finite number": unknown}
    why = " and ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    told = f"{point.name}: {point.missing} of {len(point.results)} runs have no value, since {why}"
    return f"{told}; those that are left rank behind settings of which all runs have one." if point.values else f"{told}."


def _tied(best: Point, point: Point) -> bool | None:
    apart = differ(best.estimate, point.estimate) if best.estimate and point.estimate else None
    return None if apart is None else not apart


def values_of(results: Sequence[Result], metric: Metric) -> list[float]:
    """Returns the metric of the runs that have ended well and have it as a number."""
    values = [metric.of(result.summary) for result in results if result.summary]
    return [value for value in values if value is not None and math.isfinite(value)]


def without_value(results: Sequence[Result], metric: Metric) -> list[Result]:
    """Returns the runs that have ended well and whose metric is no finite number."""
    return [result for result in results if result.summary and not values_of([result], metric)]
