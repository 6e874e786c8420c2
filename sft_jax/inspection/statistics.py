"""Numbers over all data, from the stores and the plan of the rows: no row is read again for them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sft_jax.data.packing.overlength import supervised_targets
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.inspection.subject import InspectedSet, Subject


class Problem(NamedTuple):
    """A row that cannot be used, or an example that does not fit a row."""

    set: InspectedSet
    file: str
    line: int
    reason: str


class StreamShares(NamedTuple):
    """What each set is of a stream of rows, all epochs together; arrays are [sets]."""

    documents: np.ndarray  # int64
    tokens: np.ndarray  # int64, positions
    supervised: np.ndarray  # int64


def problems(item: InspectedSet) -> Iterator[Problem]:
    """Yields all problems of a set in the order of the data."""
    store = item.store
    numbers = np.flatnonzero(item.shortened.problematic()).tolist()
    bad = [(entry["file"], entry["line"], entry["reason"]) for entry in store.bad_rows]
    others = [(int(store.files[n]), int(store.lines[n]), item.shortened.problem(n)) for n in numbers]
    for file, line, reason in sorted(bad + others, key=lambda entry: entry[:2]):
        yield Problem(item, store.file_names[file], line, reason)


def problem_count(item: InspectedSet) -> int:
    """Returns how many problems a set has."""
    return len(item.store.bad_rows) + int(item.shortened.problematic().sum())


def row_fill(stream: RowStream) -> np.ndarray:
    """Returns how many positions of each row hold a token, int64 [rows]."""
    ends = np.concatenate([[0], np.cumsum(stream.documents.lengths[stream.plan.documents])])
    return np.diff(ends[stream.plan.offsets])


def shares(subject: Subject) -> StreamShares:
    """Returns the shares of the training sets, as rows are packed."""
    stream = subject.data.train
    documents, placed = stream.documents, stream.plan.documents
    bases = stream.corpus.bases
    of_set = np.searchsorted(bases, documents.example[placed], side="right") - 1

    def total(amounts: np.ndarray | None) -> np.ndarray:
        return np.bincount(of_set, amounts, minlength=len(bases) - 1).astype(np.int64)

    supervised = supervised_targets(stream.corpus, documents)[placed]
    return StreamShares(total(None), total(documents.lengths[placed]), total(supervised))
