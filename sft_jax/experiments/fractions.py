"""The runs of a learning curve: nested fractions of the training rows, more seeds where they are small."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from sft_jax.config import Config
from sft_jax.config_parsing import parse_config
from sft_jax.errors import UserError
from sft_jax.experiments.cost import Cost, costs_of
from sft_jax.experiments.metric import Metric, find_metric
from sft_jax.experiments.runs import Run, check_whole, file_name
from sft_jax.training.platform import set_up_platform

Budget = Literal["epochs", "steps"]

FEWEST_SIZES, FEWEST_RUNS = 3, 4  # that a law of three numbers can be fitted to with something left to judge it by


@dataclass(frozen=True)
class CurvePlan:
    """What is to be run, and what it costs."""

    runs: list[Run]
    fractions: list[Fraction]  # of each run
    costs: list[Cost]
    rows: list[int]  # of the training data that each run uses
    whole: int  # rows of all data
    metric: Metric
    budget: Budget

    def __str__(self) -> str:
        steps, tokens = sum(cost.steps for cost in self.costs), sum(cost.tokens for cost in self.costs)
        return (
            f"{len(self.runs)} runs on {min(self.rows):,} to {max(self.rows):,} rows of {self.whole:,}, the same {self.budget} each: "
            f"{steps:,} steps and {tokens:,} tokens in all. The curve is that of {self.metric}."
        )


def read_fractions(texts: Sequence[str]) -> list[Fraction]:
    """Returns fractions in rising order. Raises UserError for what is none.

    >>> [str(one) for one in read_fractions(["1", "0.5", "1/8"])]
    ['1/8', '1/2', '1']
    """
    found = set()
    for text in texts:
        try:
            fraction = Fraction(text.strip())
        except (ValueError, ZeroDivisionError):
            raise UserError(f"--fractions: '{text}' is no number; write such as 1/16,1/8,1/4,1/2,1.") from None
        if not 0 < fraction <= 1:
            raise UserError(f"--fractions: must be above 0 and at most 1, not {text}.")
        found.add(fraction)
    if len(found) < FEWEST_SIZES or len(found) < len(texts):
        raise UserError(f"--fractions: must be {FEWEST_SIZES} different ones at least, not {','.join(texts)}.")
    return sorted(found)


def seed_counts(sizes: int, most: int) -> list[int]:
    """Returns the number of seeds of each of so many fractions, the smallest first: `most` there, in equal steps to 1.

    Small samples differ more, and cost less.

    >>> seed_counts(5, 3)
    [3, 3, 2, 2, 1]
    """
    return [math.ceil(most - (most - 1) * place / (sizes - 1)) for place in range(sizes)]


def plan_curve(
    raw: dict[str, Any], fractions: Sequence[Fraction], seeds: int, budget: Budget, metric: str | None, log: Callable[[str], None]
) -> CurvePlan:
    """Returns the runs of a learning curve with their costs; the data are prepared and the model composed.

    The rows of a run are `cap` rows of each training set (sft_jax.data.packing.cap): those with the smallest random bits of the
    run's seed. So for one seed the rows of a fraction are among those of each larger one, and other seeds have other samples.

    Args:
        seeds: of the smallest fraction; see `seed_counts`.
        budget: "epochs": each run makes the epochs of the recipe; "steps": as many steps as the run with all data.

    Raises UserError for whatever a run would refuse before its first step.
    """
    if seeds < 1:
        raise UserError(f"--seeds: must be at least 1, not {seeds}.")
    counts = seed_counts(len(fractions), seeds)
    if sum(counts) < FEWEST_RUNS:
        raise UserError(f"--seeds: {sum(counts)} runs cannot tell noise from a curve of three numbers; give more seeds or fractions.")
    config = _without_model(parse_config(raw))
    check_whole(config)
    if budget == "epochs" and config.train.steps:
        raise UserError("train.steps: is set, so runs would not make the same epochs; set it to 0, or give --budget=steps.")
    found = find_metric(config, metric)
    set_up_platform(config.train.deterministic)
    [whole] = costs_of([_run(config, Fraction(1))], log)
    smallest = min(whole.rows.values())
    caps = [{name: max(1, round(fraction * rows)) for name, rows in whole.rows.items()} for fraction in fractions]
    if len({tuple(cap.values()) for cap in caps}) < len(caps):
        raise UserError(f"--fractions: of {smallest:,} rows some are the same number of rows; leave out the smallest.")
    runs, of_run = [], []
    for fraction, cap, count in zip(fractions, caps, counts, strict=True):
        sets = tuple(dataclasses.replace(item, cap=cap[item.name]) for item in config.data.train)
        data = config.data if fraction == 1 else dataclasses.replace(config.data, train=sets)
        train = dataclasses.replace(config.train, steps=whole.steps) if budget == "steps" else config.train
        for seed in range(config.seed, config.seed + count):
            runs.append(_run(dataclasses.replace(config, data=data, train=train, seed=seed), fraction))
            of_run.append(fraction)
    costs = costs_of(runs, log)
    return CurvePlan(runs, of_run, costs, [sum(cost.rows.values()) for cost in costs], sum(whole.rows.values()), found, budget)


def _run(config: Config, fraction: Fraction) -> Run:
    told = f"fraction={str(fraction).replace('/', 'of')}"
    return Run(file_name(f"{told} seed={config.seed}"), told, config, {"fraction": str(fraction)})


def _without_model(config: Config) -> Config:
    """Returns the configuration of a run that leaves numbers and no model: of many runs nobody wants all models."""
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, export=False), checkpoint=dataclasses.replace(config.checkpoint, save_last=False)
    )
