"""What an evaluation of a set found, as numbers for logs, for JSON, and by slices of the set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sft_jax.evaluation.bootstrap import interval, share_interval
from sft_jax.evaluation.losses import DocumentSums, Values
from sft_jax.evaluation.scoring import Scored, ratio


@dataclass(frozen=True)
class SetResult:
    """Losses of all documents of a set, and scores of the answers to some of them."""

    documents: DocumentSums
    asked: Sequence[int] = ()  # the documents that were answered, ascending
    scored: Mapping[str, Scored] = field(default_factory=dict)
    records: Sequence[dict[str, Any]] = ()  # one for each answer, see samples.sample_records

    def values(self) -> Values:
        """Returns the values of the loss, and the score of every scorer, by name."""
        return {**self.documents.values(), **{name: scored.value for name, scored in self.scored.items()}}

    def record(self, slices: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> dict[str, Any]:
        """Returns what the log of a run says: `values`, "intervals" of the loss and of every score, and "slices" as in `describe`."""
        described = self.describe(slices, seed)
        intervals = {"loss": described["loss_interval"], **{name: score["interval"] for name, score in described.get("scores", {}).items()}}
        return {**self.values(), "intervals": intervals, **({"slices": described["slices"]} if slices else {})}

    def select(self, documents: np.ndarray) -> "SetResult":
        """Returns the result of some of the documents alone, given as ascending indices."""
        answered = np.flatnonzero(np.isin(np.asarray(self.asked, np.int64), documents))
        return SetResult(
            self.documents.select(documents),
            [self.asked[place] for place in answered],
            {name: scored.select(answered) for name, scored in self.scored.items()},
            [self.records[place] for place in answered],
        )

    def describe(self, slices: Mapping[str, Mapping[str, np.ndarray]] | None = None, seed: int = 0) -> dict[str, Any]:
        """Returns everything as JSON values.

        Args:
            slices: by column and value, the documents of each slice.
            seed: of the bootstrap.

        Returns:
            The values of `DocumentSums.values`, with "loss_interval"; "scores": by name {"value", "interval", "answers": how
            many count}; "slices": by column and value, the same of the documents there. An interval is [low, high] at 95 %,
            null where there is none; so is a score that counts no answer.
        """
        pairs = np.stack([self.documents.nll, self.documents.weight], axis=1)
        result: dict[str, Any] = {**self.documents.values(), "loss_interval": _ends(interval(pairs, ratio, seed=seed))}
        if self.scored:
            result["scores"] = {name: describe_score(scored, seed) for name, scored in self.scored.items()}
        if slices:
            result["slices"] = {
                column: {value: self.select(documents).describe(seed=seed) for value, documents in values.items()}
                for column, values in slices.items()
            }
        return result


def describe_score(scored: Scored, seed: int) -> dict[str, Any]:
    """Returns "value", "interval" and "answers" (how many count) of a score; null where no answer counts, or there is no interval."""
    counted = np.array([scored.scorer.counts(row) for row in scored.statistics], bool)
    if not counted.any():
        return {"value": None, "interval": None, "answers": 0}
    statistics, value = scored.statistics[counted], scored.scorer.value
    found = (share_interval(statistics) if value is ratio else None) or interval(statistics, value, seed=seed)
    return {"value": scored.value, "interval": _ends(found), "answers": int(counted.sum())}


def _ends(found) -> list[float] | None:
    return None if found is None else list(found)
