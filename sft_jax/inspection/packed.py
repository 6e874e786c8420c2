"""Packed rows as training reads them: the documents in a row, where each is from, and what of it is predicted."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sft_jax.data.packing.pipeline import RowStream
from sft_jax.errors import UserError
from sft_jax.inspection.filters import Filters, find_sets, wanted_rows
from sft_jax.inspection.subject import InspectedSet, Subject

_AT_A_TIME = 64  # rows that are read together where some are looked for


class Segment(NamedTuple):
    """One document of a row. At position start + t the model reads tokens[t] and is trained on targets[t] by weights[t]."""

    set: str
    file: str
    line: int
    turn: int
    start: int  # position in the row
    tokens: np.ndarray  # int32 [n]
    targets: np.ndarray  # int32 [n], the token after each in the document
    weights: np.ndarray  # float32 [n], of targets

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def ids(self) -> np.ndarray:
        """The tokens of the document, int32 [n + 1]."""
        return np.append(self.tokens[:1], self.targets)

    @property
    def id_weights(self) -> np.ndarray:
        """The weight of each of `ids` as a target, float32 [n + 1]; the first is none."""
        return np.append(np.float32(0), self.weights)


class PackedRow(NamedTuple):
    """One row of a stream."""

    stream: str  # "train", or the name of an eval set
    number: int  # from 1 on
    of: int  # rows of the stream
    length: int  # positions
    segments: tuple[Segment, ...]

    @property
    def used(self) -> int:
        """Positions that are no padding."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def supervised(self) -> int:
        return sum(int((segment.weights > 0).sum()) for segment in self.segments)


def read_row(stream: RowStream, name: str, number: int) -> PackedRow:
    """Returns row `number`, from 0 on, of a stream."""
    batch = stream.read(number, 1)
    segments = []
    for index in range(int(batch.segments[0].max())):
        at = np.flatnonzero(batch.segments[0] == index + 1)
        identity = stream.identity(batch.examples[0, index])
        segments.append(Segment(*identity, int(at[0]), batch.tokens[0, at], batch.targets[0, at], batch.weights[0, at]))
    return PackedRow(name, number + 1, stream.total_rows, stream.max_length, tuple(segments))


class PackedSelection:
    """Packed rows that filters let through, in the order of training. After `take`, `matched` and `of` say how many."""

    def __init__(self, subject: Subject, filters: Filters):
        """Takes the rows in which a document of the set, or of the row file:line, lies; or one packed row by its number.

        Raises UserError naming the flag where there is no such row, and for filters that are of examples alone.
        """
        for name in ("longest", "cut", "zero_weight", "problems", "search", "regex"):
            if getattr(filters, name):
                raise UserError(f"--{name}: chooses examples, not packed rows; leave out --{name} or --rows.")
        self.matched = self.of = 0
        self._filters = filters
        self._sets = find_sets(subject, filters.set)
        self._wanted = wanted_rows(subject, filters) if ":" in filters.row else None
        self._number = 0
        if filters.row and self._wanted is None:
            most = max(item.stream.total_rows for item in self._sets)
            if not filters.row.isdecimal() or not 1 <= int(filters.row) <= most:
                raise UserError(f"--row: there is no packed row {filters.row}; they are numbered from 1 to {most:,}.")
            self._number = int(filters.row)

    def take(self, limit: int = 0) -> Iterator[PackedRow]:
        """Yields the rows, at most `limit` (0 = all); the others are counted. Call it once."""
        streams: dict[int, list[InspectedSet]] = {}
        for item in self._sets:
            streams.setdefault(id(item.stream), []).append(item)
        for sets in streams.values():
            stream, name = sets[0].stream, "train" if sets[0].split == "train" else sets[0].name
            self.of += stream.total_rows
            for number in self._numbers(stream, sets):
                self.matched += 1
                if not limit or self.matched <= limit:
                    yield read_row(stream, name, number)

    def _numbers(self, stream: RowStream, sets: list[InspectedSet]) -> Iterator[int]:
        if self._number:
            yield from range(self._number - 1, min(self._number, stream.total_rows))
            return
        examples = self._examples(sets)
        for first in range(0, stream.total_rows, _AT_A_TIME):
            if examples is None:
                yield from range(first, min(first + _AT_A_TIME, stream.total_rows))
                continue
            batch = stream.read(first, min(_AT_A_TIME, stream.total_rows - first))
            yield from (first + np.flatnonzero(np.isin(batch.examples, examples).any(axis=1))).tolist()

    def _examples(self, sets: list[InspectedSet]) -> np.ndarray | None:
        """Returns the numbers of the examples of which a row must hold one, None where every row will do."""
        if self._wanted is not None:
            return np.array(
                [n for item, rows in self._wanted if item in sets for row in rows for n in item.examples_of(row)], np.int64
            )
        if not self._filters.set:
            return None
        return np.concatenate([np.arange(item.first, item.first + len(item.store)) for item in sets])
