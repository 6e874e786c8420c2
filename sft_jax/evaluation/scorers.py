"""SCORERS: how a generated answer is compared with the reference answer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A score as sum and count, so that scores of any subsets add up to the score of the whole.

    A ratio of sums, never a mean of means.
    """

    total: float = 0.0
    count: float = 0.0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """The score per counted item; NaN when nothing was counted, which is not the same as a score of 0."""
        return self.total / self.count if self.count else float("nan")


Scorer = Callable[[str, str], Score]  # (generation, reference) -> Score


def exact_match(generation: str, reference: str) -> Score:
    """Counts 1 where the texts are equal but for white space at their ends.

    >>> exact_match(" Paris", "Paris\\n")
    Score(total=1.0, count=1.0)
    """
    return Score(float(generation.strip() == reference.strip()), 1.0)


SCORERS: dict[str, Scorer] = {
    "exact_match": exact_match,
}


def score(name: str, pairs: Iterable[tuple[str, str]]) -> Score:
    """Returns the score `name` summed over pairs (generation, reference)."""
    return sum((SCORERS[name](generation, reference) for generation, reference in pairs), Score())
