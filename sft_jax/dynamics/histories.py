"""Exposures put together by document: how the loss of each went over time, beside that of its contemporaries."""

from dataclasses import dataclass

import numpy as np

from sft_jax.dynamics.parts import Documents, Exposures
from sft_jax.dynamics.trend import contemporaries

SMALLEST_SPREAD = 0.01  # nats a token: below it all contemporaries are taken to be alike, and a deviation is measured by this


@dataclass(frozen=True)
class Histories:
    """The exposures of each document that came up, in the order of the steps.

    The history of `document[i]` is [begins[i], begins[i + 1]) of the other arrays.
    """

    document: np.ndarray  # int64 [n], ascending
    begins: np.ndarray  # int64 [n + 1]
    step: np.ndarray  # int32 [exposures]
    loss: np.ndarray  # float64 [exposures], nats a supervised token
    accuracy: np.ndarray  # float64 [exposures], share of supervised tokens that are the argmax
    weight: np.ndarray  # float64 [exposures]
    excess: np.ndarray  # float64 [exposures], loss above the median of contemporaries, nats a supervised token
    spread: np.ndarray  # float64 [exposures], robust standard deviation of contemporaries, nats a supervised token
    left_out: int  # exposures in steps that were left out since they were not finite
    unsupervised: int  # exposures without a supervised token

    def __len__(self) -> int:
        return len(self.document)

    @property
    def deviation(self) -> np.ndarray:
        """The excess in robust standard deviations, float64 [exposures]."""
        return self.excess / self.spread

    @property
    def score(self) -> np.ndarray:
        """How badly each document was learnt: its mean deviation over all exposures, float64 [n].

        A mean over training, as of the margin by AUM (Pleiss et al. 2020, arXiv:2001.10528), which finds wrong labels better than
        the last loss. Late exposures count more, since contemporaries differ less then.
        """
        return self.mean(self.deviation)

    @property
    def counts(self) -> np.ndarray:
        """How often each document came up, int64 [n]."""
        return np.diff(self.begins)

    def first(self, values: np.ndarray) -> np.ndarray:
        """Returns [n], `values` [exposures] at the first exposure of each document."""
        return values[self.begins[:-1]]

    def last(self, values: np.ndarray) -> np.ndarray:
        """Returns [n], `values` [exposures] at the last exposure of each document."""
        return values[self.begins[1:] - 1]

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Returns [n], the mean of `values` [exposures] over the exposures of each document."""
        return np.add.reduceat(values, self.begins[:-1]) / self.counts if len(self) else np.zeros(0)

    def least(self, values: np.ndarray) -> np.ndarray:
        """Returns [n], the least of `values` [exposures] over the exposures of each document."""
        return np.minimum.reduceat(values, self.begins[:-1]) if len(self) else values[:0]

    def number(self) -> np.ndarray:
        """Returns [exposures], the number of each exposure in the history of its document, from 0 on."""
        return np.arange(len(self.step)) - np.repeat(self.begins[:-1], self.counts)

    def place(self, document: int) -> int | None:
        """Returns the place of a document in `document`, None where it never came up."""
        place = int(np.searchsorted(self.document, document))
        return place if place < len(self) and self.document[place] == document else None


def make_histories(exposures: Exposures, documents: Documents) -> Histories:
    """Returns the histories of all documents that came up, each measured against the documents of its set."""
    finite, supervised = np.isfinite(exposures.loss_sum), exposures.weight > 0
    used = exposures.select(finite & supervised)
    used = used.select(np.lexsort((used.step, used.document)))
    weight = used.weight.astype(np.float64)
    loss = used.loss_sum / weight
    median, spread = contemporaries(used.step, documents.set[used.document], loss)
    found, begins = np.unique(used.document, return_index=True)
    return Histories(
        document=found.astype(np.int64),
        begins=np.append(begins, len(used)),
        step=used.step,
        loss=loss,
        accuracy=used.correct / weight,
        weight=weight,
        excess=loss - median,
        spread=np.maximum(spread, SMALLEST_SPREAD),
        left_out=int((~finite).sum()),
        unsupervised=int((finite & ~supervised).sum()),
    )
