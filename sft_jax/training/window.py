"""Sums of step metrics: over a window of the log, and over the whole run, also one that was stopped and continued.

Means are made once, from sums: a window's loss is the total over its supervised tokens, never a mean of means.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

NAMES = ("loss_sum", "weight", "correct", "supervised_tokens", "real_tokens", "attention_pairs", "nonfinite", "empty")
_LOSS = ("loss_sum", "weight", "correct")
_AS_THEY_ARE = ("grad_norm", "learning_rate", "update_ratio", "expert_load_peak")  # of the last step, the last of a model of experts only


@dataclass
class Sums:
    """Of some steps. A step whose time is not known, since it compiled, is left out of `timed`, `steps`, `seconds`."""

    all: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    terms: dict[str, float] = field(default_factory=dict)  # of the loss, beside the likelihood
    timed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    steps: int = 0
    seconds: float = 0.0

    def add(self, metrics: dict[str, float], terms: dict[str, float], seconds: float | None) -> None:
        for name in NAMES:
            self.all[name] += metrics[name]
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + value
        if seconds is not None:
            for name in NAMES:
                self.timed[name] += metrics[name]
            self.steps += 1
            self.seconds += seconds

    def rates(self) -> dict[str, float]:
        """Returns tokens per second and seconds per step; nothing where no step was timed."""
        if not self.steps or not self.seconds > 0:
            return {}
        return {
            "real_tokens_per_second": self.timed["real_tokens"] / self.seconds,
            "supervised_tokens_per_second": self.timed["supervised_tokens"] / self.seconds,
            "seconds_per_step": self.seconds / self.steps,
        }


class Window:
    """The steps since the last record of the log, and `run`, all steps of the run.

    `state` goes into every checkpoint, so that a run that continues logs what one that never stopped would.
    """

    def __init__(self, state: dict[str, Any] | None = None):
        """Begins a run, or continues from the `state` of another window."""
        state = state or {}
        self.run = Sums(**state.get("run", {}))
        self._window = Sums(**state.get("window", {}))
        self._last: dict[str, float | None] = state.get("last", {"grad_norm": None, "learning_rate": None})

    def state(self) -> dict[str, Any]:
        return {"run": dataclasses.asdict(self.run), "window": dataclasses.asdict(self._window), "last": self._last}

    def add(self, metrics: dict[str, Any], seconds: float | None) -> None:
        """Adds the metrics of one step, already on the host; `seconds` is None for a step that was not timed.

        The loss of a step that was left out since it is not finite would make that of every other step unreadable, so
        only its tokens count, and the step itself.
        """
        terms = {name: float(value) for name, value in metrics["loss_terms"].items()}
        metrics = {name: float(value) for name, value in metrics.items() if name in (*NAMES, *_AS_THEY_ARE)}
        if metrics["nonfinite"]:
            metrics, terms = metrics | dict.fromkeys(_LOSS, 0.0), {}
        else:
            # An update of the size of what float32 holds has no ratio, and JSON no infinity.
            self._last = {name: metrics[name] if math.isfinite(metrics[name]) else None for name in _AS_THEY_ARE if name in metrics}
        for sums in (self._window, self.run):
            sums.add(metrics, terms, seconds)

    def take(self) -> dict[str, float | None]:
        """Returns the means and rates of the window and begins another. A mean over nothing is None."""
        sums = self._window.all
        record = {
            "loss": sums["loss_sum"] / sums["weight"] if sums["weight"] else None,
            "accuracy": sums["correct"] / sums["weight"] if sums["weight"] else None,
            **{name: self._window.terms.get(name, 0.0) / sums["weight"] if sums["weight"] else None for name in self.run.terms},
            **self._last,
            "real_tokens": sums["real_tokens"],
            "supervised_tokens": sums["supervised_tokens"],
            **self._window.rates(),
        }
        for name in ("nonfinite", "empty"):
            if sums[name]:
                record[f"{name}_steps"] = sums[name]
        self._window = Sums()
        return record
