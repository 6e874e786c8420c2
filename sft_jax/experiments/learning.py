"""A learning curve from its runs: the mean of each fraction, the law through all runs, and what it says."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from sft_jax.evaluation.evals import Between
from sft_jax.experiments.curve import Curve, learning_curve, limit_of
from sft_jax.experiments.engine import Result, check_same_data, run_all
from sft_jax.experiments.fractions import FEWEST_RUNS, FEWEST_SIZES, CurvePlan
from sft_jax.experiments.statistics import Estimate, estimate
from sft_jax.experiments.sweep import check_some, values_of, without_value
from sft_jax.training.workdir import Workdir


@dataclass(frozen=True)
class Level:
    """The runs on one fraction of the data."""

    fraction: Fraction
    rows: int
    steps: int
    tokens: int  # of a run
    values: list[float]  # of the metric
    estimate: Estimate | None


@dataclass(frozen=True)
class Learning:
    """What has come out."""

    plan: CurvePlan
    results: list[Result]
    levels: list[Level]  # the smallest fraction first
    curve: Curve | None  # None: too few runs have a value
    notes: list[str]

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.summary is None]


def run_curve(
    plan: CurvePlan, work: Workdir, retry: bool, log: Callable[[str], None], progress: Between = lambda what, done, total: None
) -> Learning:
    """Runs what is missing of a learning curve in its folder and returns all of it. Finished runs keep no checkpoints.

    Raises UserError where a folder holds another run, and where every run has failed; StoppedBySignal as `run_all`.
    """
    results = run_all(plan.runs, plan.costs, work, retry, log, keep_states=False, progress=progress)
    check_some(results)
    note = check_same_data(results)
    return summarise(plan, results, [note] if note else [])


def summarise(plan: CurvePlan, results: list[Result], notes: list[str]) -> Learning:
    """Returns the curve of the runs."""
    levels, rows, values = [], [], []
    for fraction in dict.fromkeys(plan.fractions):
        places = [place for place, of_run in enumerate(plan.fractions) if of_run == fraction]
        found = values_of([results[place] for place in places], plan.metric)
        cost = plan.costs[places[0]]
        levels.append(
            Level(fraction, plan.rows[places[0]], cost.steps, cost.tokens, found, estimate(found) if found else None)
        )
        rows += [plan.rows[places[0]]] * len(found)
        values += found
    if unknown := without_value(results, plan.metric):
        names = ", ".join(result.run.name for result in unknown)
        notes = [*notes, f"{len(unknown)} of {len(results)} runs have finished with a {plan.metric} that is no finite number, and do not count: {names}."]
    if len(values) < FEWEST_RUNS or len(set(rows)) < FEWEST_SIZES:
        notes = [*notes, f"Cannot tell: {len(values)} runs of {len(set(rows))} sizes have a value, too few for a curve."]
        return Learning(plan, results, levels, None, notes)
    relative, limit = limit_of(plan.metric.name, plan.metric.lower, values)
    curve = learning_curve(rows, values, plan.whole, lower=plan.metric.lower, relative=relative, limit=limit)
    return Learning(plan, results, levels, curve, notes)
