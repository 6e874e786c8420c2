"""What a scorer is: numbers of each answer that add up over answers, and what their sums say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Sums = np.ndarray  # float64 [..., k]


class Choice(NamedTuple):
    """A possible answer and how likely the model finds it."""

    text: str
    log_likelihood: float  # nats, of its tokens with the end of turn
    right: bool  # it is the row's own answer


@dataclass(frozen=True)
class Answer:
    """A generated answer beside what was expected."""

    generation: str
    reference: str
    prompt: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)  # the row of the data, with all its columns; for a scorer that needs it
    choices: tuple[Choice, ...] = ()  # answers to choose from; for a scorer that needs them


def ratio(sums: Sums) -> np.ndarray:
    """Returns total / count of statistics [..., (total, count)]; NaN where nothing was counted, which is no score of 0."""
    total, count = np.asarray(sums, np.float64)[..., 0], np.asarray(sums, np.float64)[..., 1]
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count != 0)


@dataclass(frozen=True)
class Scorer:
    """How answers are compared with references.

    A score is always made from sums over answers, never a mean of means, so the scores of parts add up to that of the
    whole, and what is resampled for an interval are answers.
    """

    statistics: Callable[[Answer], Sequence[float]]  # of one answer: (total, count), or what `value` understands
    value: Callable[[Sums], np.ndarray] = ratio  # sums of statistics -> score
    counts: Callable[[Sequence[float]], bool] = lambda statistics: statistics[1] != 0  # whether the answer takes part
    alone: Callable[[Sums], np.ndarray] | None = None  # statistics of one answer -> its score by itself, where `value` is of a corpus alone
    needs_row: bool = False  # looks at the row of the data
    choices: str | None = None  # looks at the choices in this column of the row


def mean_of(compare: Callable[[str, str], float]) -> Scorer:
    """Returns the scorer that averages `compare` (generation, reference) over answers."""
    return Scorer(lambda answer: (float(compare(answer.generation, answer.reference)), 1.0))


@dataclass(frozen=True)
class Scored:
    """The statistics of a scorer over some answers."""

    scorer: Scorer
    statistics: np.ndarray  # float64 [answers, k]

    @property
    def counted(self) -> int:
        """Answers that take part; the others give this scorer nothing to compare with."""
        return sum(map(self.scorer.counts, self.statistics))

    @property
    def value(self) -> float:
        """The score of all of them; NaN where none is counted."""
        return float(self.scorer.value(self.statistics.sum(axis=0))) if self.counted else float("nan")

    def of_each(self) -> list[float | None]:
        """Returns the score of each answer by itself, None where it does not take part."""
        value = self.scorer.alone or self.scorer.value
        return [float(value(row)) if self.scorer.counts(row) else None for row in self.statistics]

    def select(self, chosen: np.ndarray) -> "Scored":
        """Returns those of the answers that `chosen` (bool [answers] or indices) names."""
        return Scored(self.scorer, self.statistics[chosen])


def score(scorer: Scorer, answers: Sequence[Answer]) -> Scored:
    """Returns the statistics of `scorer` over the answers."""
    statistics = [scorer.statistics(answer) for answer in answers]
    return Scored(scorer, np.array(statistics, np.float64).reshape(len(answers), len(statistics[0]) if statistics else 0))
