"""Which states of a run were the best so far by a metric of held-out data, and whether it is worth going on."""

import math
from collections.abc import Sequence
from typing import Any

from sft_jax.config import Config
from sft_jax.errors import UserError, did_you_mean

_LOWER = ("loss", "perplexity", "bits_per_byte")  # lower is better
_HIGHER = ("accuracy",)


class Best:
    """The best evaluated states of a run by `checkpoint.best`; without it, nothing is ever best.

    What it knows goes into every checkpoint, so a run that continues decides as one that never stopped. The state before
    training is none of them: that is the base.
    """

    def __init__(self, config: Config, known: dict[str, Any] | None = None):
        """Goes on from `known`, a `state()`. Raises UserError where checkpoint.best names no metric of the evaluation."""
        self._set, self.metric = _find(config) if config.checkpoint.best else ("", "")
        mode = config.checkpoint.best_mode
        self._lower = self.metric in _LOWER if mode == "auto" else mode == "min"
        self._keep, self._patience = config.checkpoint.keep_best, config.train.patience
        self._names = {"set": self._set, "metric": self.metric, "lower": self._lower}
        same = known is not None and all(known.get(name) == value for name, value in self._names.items())
        self._values: dict[int, float] = {int(step): value for step, value in known["values"].items()} if same else {}
        self._since: int = known["evaluations_since"] if same else 0
        self._last: int = known["last"] if same else 0  # the step that was evaluated last

    def state(self) -> dict[str, Any] | None:
        """Returns what a later start goes on from, as JSON values: the best values by step, the best one first."""
        values = {str(step): self._values[step] for step in self.steps}
        return {**self._names, "values": values, "evaluations_since": self._since, "last": self._last} if self.metric else None

    def add(self, step: int, results: dict[str, dict[str, Any]]) -> None:
        """Takes note of the evaluation of `step`. A value that is no number is worse than any other."""
        if self.knows(step):
            return
        self._last = step
        value = results[self._set].get(self.metric)
        if value is None or not math.isfinite(value):
            self._since += 1
            return
        before = self.step
        self._values[step] = float(value)
        self._since = 0 if self.step != before else self._since + 1
        self._values = {kept: self._values[kept] for kept in self.steps[: self._keep]}

    def knows(self, step: int) -> bool:
        """Returns whether `add` would change nothing."""
        return not self.metric or step <= self._last

    @property
    def steps(self) -> list[int]:
        """The best steps, at most `checkpoint.keep_best`, the best one first; of equal values the earlier one is better."""
        sign = 1 if self._lower else -1
        return sorted(self._values, key=lambda step: (sign * self._values[step], step))

    @property
    def step(self) -> int | None:
        """The best step."""
        return self.steps[0] if self._values else None

    @property
    def ended(self) -> bool:
        """Whether `train.patience` evaluations in a row were no better than the best."""
        return 0 < self._patience <= self._since

    def __str__(self) -> str:
        """Describes the best state."""
        return f"step {self.step}, {self._set} {self.metric} {self._values[self.step]:.4f}"


def _find(config: Config) -> tuple[str, str]:
    """Returns (set, metric) of checkpoint.best."""
    wanted, sets = config.checkpoint.best, [item.name for item in config.data.eval]
    metrics = [*_LOWER, *_HIGHER, *(config.eval.scorers if config.eval.generate else ())]
    found = [(name, wanted[len(name) + 1 :]) for name in sets if wanted.startswith(f"{name}/")]
    if not found and wanted in metrics:
        if len(sets) > 1:
            raise UserError(f"checkpoint.best: '{wanted}' is a metric of {len(sets)} sets; say of which, such as {sets[0]}/{wanted}.")
        found = [(sets[0], wanted)]
    known: Sequence[str] = metrics if len(sets) == 1 else [f"{name}/{metric}" for name in sets for metric in metrics]
    for name, metric in found:
        if metric in metrics:
            return name, metric
    hint = "" if config.eval.generate else " Scores of answers need eval.generate."
    raise UserError(f"checkpoint.best: '{wanted}' is no metric of the evaluation; {did_you_mean(wanted, known)}.{hint}")
