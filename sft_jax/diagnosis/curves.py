"""Values over the steps of a run, and what can be said of them beside their noise."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Level(NamedTuple):
    """The mean of a stretch of a curve."""

    mean: float
    error: float  # standard error, from the differences of neighbours, which a trend does not move; infinite of one value


class Curve(NamedTuple):
    """Values in the order of the steps."""

    steps: np.ndarray  # int64 [n], ascending; or float64, of what else grows with them
    values: np.ndarray  # float64 [n]

    @staticmethod
    def of(records: Iterable[dict], name: str) -> "Curve":
        """Returns the values of `name`, without records that have none."""
        found = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
        return Curve(np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64))

    def __bool__(self) -> bool:
        return len(self.steps) > 0

    def until(self, step: int) -> "Curve":
        """Returns the curve up to a step, inclusive."""
        inside = self.steps <= step
        return Curve(self.steps[inside], self.values[inside])

    def level(self, low: float, high: float) -> Level | None:
        """Returns the level between two shares of the steps, low exclusive; None where no value lies there.

        >>> Curve(np.arange(1, 5), np.array([8.0, 4.0, 2.0, 1.0])).level(0.5, 1.0).mean
        1.5
        """
        last = self.steps[-1] if len(self.steps) else 0
        inside = self.values[(self.steps > low * last) & (self.steps <= high * last)]
        if not len(inside):
            return None
        # Neighbours differ by noise alone where the trend is slow: their mean square difference is twice its variance.
        noise = np.sqrt(np.mean(np.diff(inside) ** 2) / 2) if len(inside) > 1 else np.inf
        return Level(float(inside.mean()), float(noise / np.sqrt(len(inside))))

    def levels(self, parts: int) -> list[Level]:
        """Returns the levels of so many equal parts of the steps, without parts that hold no value."""
        found = (self.level(part / parts, (part + 1) / parts) for part in range(parts))
        return [level for level in found if level is not None]
