"""The number by which runs are compared: a metric of held-out data."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.training.best import Best


@dataclass(frozen=True)
class Metric:
    """A metric of an evaluation."""

    set: str
    name: str
    lower: bool  # is better

    def __str__(self) -> str:
        return f"{self.set}/{self.name}"

    def of(self, summary: dict[str, Any]) -> float | None:
        """Returns its value from a run's summary.json: that of the best state where `checkpoint.best` is this metric,
        since that is what the run exports, else the one at the end; None where it is no number."""
        best = summary.get("best")
        if best and (best["set"], best["metric"]) == (self.set, self.name) and best["values"]:
            return next(iter(best["values"].values()))
        return summary["eval_last"].get(self.set, {}).get(self.name)


def find_metric(config: Config, wanted: str | None) -> Metric:
    """Returns the metric that `--metric` names: SET/NAME, or NAME where there is one set.

    By default it is `checkpoint.best`, else the loss of the only set. Raises UserError where the runs will have no such
    metric, or where nobody has said of which set.
    """
    sets = [item.name for item in config.data.eval]
    if not sets:
        raise UserError("data.eval: is empty, and runs are compared on held-out rows; name a file of them in data.eval.")
    name = wanted or config.checkpoint.best or "loss"
    mode = config.checkpoint.best_mode if name == config.checkpoint.best else "auto"
    try:
        state = Best(dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, best=name, best_mode=mode))).state()
    except UserError as error:
        if wanted is None and config.checkpoint.best:
            raise
        raise UserError(str(error).replace("checkpoint.best:", "--metric:", 1)) from error
    return Metric(state["set"], state["metric"], state["lower"])
