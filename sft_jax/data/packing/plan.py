"""Packing: from the lengths of documents to rows of at most `max_length` positions. Pure functions of their inputs.

A document of n tokens takes n - 1 positions, because the shift turns it into tokens[:-1] and targets[1:]. Lengths
here are positions. A document is never cut and a row never overflows.
"""

import hashlib
import math
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sft_jax.data.randomness import derive_key, permutation

WINDOW = 16384  # documents that are packed together: large enough to fill rows, small enough to be one shuffle away
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class PackPlan:
    """The rows of a stream. Row r holds the documents `documents[offsets[r] : offsets[r + 1]]`, in that order."""

    documents: np.ndarray  # int64 [placements]
    offsets: np.ndarray  # int64 [rows + 1]
    epoch_rows: tuple[int, ...]  # rows of each whole epoch, also of the last one, of which the plan may hold a part
    first_epoch_hash: str  # of the whole first epoch, however much of it the plan holds

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1


def plan_rows(
    lengths: np.ndarray,
    epoch_documents: Callable[[int], np.ndarray],
    *,
    max_length: int,
    max_segments: int,
    packing: bool = True,
    seed: int = 0,
    shuffle: bool = True,
    epochs: float = 1.0,
    rows: int = 0,
    window: int = WINDOW,
    log: Callable[[str], None] = lambda line: None,
) -> PackPlan:
    """Plans the rows of all epochs as one stream.

    Each epoch is shuffled and packed on its own, by a key of its number, so a longer run begins with the rows of a
    shorter one. A part of an epoch is the first rows of it.

    Args:
        lengths: positions of each document, int [documents], each between 1 and max_length.
        epoch_documents: gives the documents of epoch e (see sft_jax.data.packing.mixture).
        max_segments: documents in a row, at most.
        packing: False puts every document in a row of its own.
        shuffle: False keeps the order in which documents come (packing still sorts inside a window).
        epochs: passes over the data; a fraction is rounded up to whole rows, at least one.
        rows: when above 0, exactly so many rows, over as many epochs as it takes; `epochs` is ignored.
        window: documents that are packed together.
        log: takes a line now and then where there are so many epochs that planning them takes long.
    """
    if not (rows > 0 or 0 < epochs < math.inf):
        raise ValueError(f"a stream of {epochs} epochs has no rows")
    parts_documents, parts_offsets, epoch_rows, total, epoch = [], [np.zeros(1, np.int64)], [], 0, 0
    reported = time.monotonic()
    while total < rows if rows else epoch < epochs:
        if time.monotonic() - reported > _PROGRESS_SECONDS:
            reported = time.monotonic()
            log(f"data.train: {epoch:,} epochs of {total:,} rows are planned; few rows for so long a run take long.")
        documents = np.asarray(epoch_documents(epoch), np.int64)
        if not len(documents):
            raise ValueError(f"epoch {epoch} has no documents")
        if shuffle:
            documents = documents[permutation(derive_key(seed, "documents", epoch), len(documents))]
        if packing:
            order, offsets = pack(lengths[documents], max_length, max_segments, window)
        else:
            order, offsets = np.arange(len(documents)), np.arange(len(documents) + 1)
        if shuffle:
            rows_order = permutation(derive_key(seed, "rows", epoch), len(offsets) - 1)
            order, offsets = _reorder_rows(order, offsets, rows_order)
        if epoch == 0:
            first_epoch_hash = hashlib.blake2b(documents[order].astype("<i8").tobytes(), digest_size=16)
            first_epoch_hash.update(offsets.astype("<i8").tobytes())
        whole = len(offsets) - 1
        wanted = rows - total if rows else max(math.ceil(whole * min(1.0, epochs - epoch) - 1e-9), epoch == 0)
        keep = min(whole, wanted)
        parts_documents.append(documents[order[: offsets[keep]]])
        parts_offsets.append(parts_offsets[-1][-1] + offsets[1 : keep + 1])
        epoch_rows.append(whole)
        total, epoch = total + keep, epoch + 1
    return PackPlan(
        np.concatenate(parts_documents), np.concatenate(parts_offsets), tuple(epoch_rows), first_epoch_hash.hexdigest()
    )


def pack(
    lengths: np.ndarray, max_length: int, max_segments: int, window: int = WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """Packs documents by best-fit decreasing in windows of about `window` documents.

    Returns:
        order: int64 [documents], indices into `lengths` in the order of the rows.
        offsets: int64 [rows + 1], row r holds order[offsets[r] : offsets[r + 1]].

    >>> pack(np.array([3, 5, 4, 2]), max_length=8, max_segments=4)
    (array([1, 0, 2, 3]), array([0, 2, 4]))
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not (1 <= lengths.min() and lengths.max() <= max_length):
        raise ValueError(f"lengths must lie within 1 and max_length {max_length}: {lengths.min()} to {lengths.max()}")
    windows = max(1, math.ceil(len(lengths) / window))
    bounds = [len(lengths) * w // windows for w in range(windows + 1)]  # windows of equal size, no small last one
    orders, counts = [], []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        order, count = _pack_window(lengths[begin:end], max_length, max_segments)
        orders.append(order + begin)
        counts.append(count)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))])
    return np.concatenate(orders), offsets


def _pack_window(lengths: np.ndarray, max_length: int, max_segments: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: the longest document first, each into the fullest row that has room for it.

    Documents of equal length go one after the other into the row that the first of them chose, since that row is
    then the fullest; so the loop runs over (row, length) pairs. Returns (order, documents of each row).
    """
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.argsort(-lengths, kind="stable")
    distinct, repeats = np.unique(lengths, return_counts=True)
    shortest = int(distinct[0])
    free_sizes: list[int] = []  # ascending, the distinct free lengths of open rows
    open_rows: dict[int, list[int]] = {}  # free length -> rows
    slots: list[int] = []  # row -> documents that it may still take
    run_rows: list[int] = []
    run_counts: list[int] = []
    for length, count in zip(distinct[::-1].tolist(), repeats[::-1].tolist(), strict=True):
        while count:
            at = bisect_left(free_sizes, length)
            if at == len(free_sizes):
                free, row = max_length, len(slots)
                slots.append(max_segments)
            else:
                free = free_sizes[at]
                rows = open_rows[free]
                row = rows.pop()
                if not rows:
                    del open_rows[free], free_sizes[at]
            taken = min(count, free // length, slots[row])
            run_rows.append(row)
            run_counts.append(taken)
            count -= taken
            slots[row] -= taken
            free -= taken * length
            if free >= shortest and slots[row]:  # else nothing in this window can join the row
                rows = open_rows.get(free)
                if rows is None:
                    open_rows[free] = [row]
                    insort(free_sizes, free)
                else:
                    rows.append(row)
    row_of = np.repeat(np.array(run_rows), np.array(run_counts))
    return order[np.argsort(row_of, kind="stable")], np.bincount(row_of, minlength=len(slots))


def _reorder_rows(order: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (order, offsets) with the rows in the order `rows`."""
    counts = np.diff(offsets)[rows]
    new_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return order[ragged_arange(offsets[:-1][rows], counts)], new_offsets


def ragged_arange(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns concatenate([arange(s, s + c) for s, c in zip(starts, counts)]), int64.

    >>> ragged_arange(np.array([5, 0]), np.array([2, 3]))
    array([5, 6, 0, 1, 2])
    """
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
