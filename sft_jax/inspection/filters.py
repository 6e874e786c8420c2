"""Which rows and examples are shown: filters that combine, and how many they let through."""

import bisect
import collections
import heapq
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sft_jax.errors import UserError, did_you_mean
from sft_jax.inspection.details import Detail, Wanted, read_details
from sft_jax.inspection.subject import InspectedSet, Subject


@dataclass(frozen=True)
class Filters:
    """What is asked for; the default is everything."""

    set: str = ""  # name of a data set
    row: str = ""  # number of a row in its data set, from 1 on, or file:line
    longest: int = 0  # so many of the longest, longest first; 0 = all, in the order of the data
    cut: bool = False  # cut at the seam of an answer (class "cut"), or too long for a row
    zero_weight: bool = False  # no token is trained on
    problems: bool = False  # with a problem
    search: str = ""  # text that the render or the problem holds, in any case
    regex: str = ""  # pattern that is found in one of them

    def of_examples(self) -> bool:
        """Returns whether only an example that has been built tells whether it is let through."""
        return bool(self.longest or self.cut or self.zero_weight or self.problems or self.search or self.regex)

    def describe(self) -> str:
        """Returns the filters as flags, "" where there are none."""
        values = {name: value for name, value in vars(self).items() if value}
        return " ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items())


class Selection:
    """Examples that filters let through. After `take`, `matched` says how many there are, and `of` among how many.

    Both count examples, and rows that cannot be used; `of` those in the rows that `set` and `row` name.
    """

    def __init__(self, subject: Subject, filters: Filters):
        """Raises UserError naming the flag where a filter names nothing that is there."""
        self.matched = self.of = 0
        self._subject, self._filters = subject, filters
        self._pattern = _pattern(filters)
        self._wanted: Wanted = wanted_rows(subject, filters)

    def take(self, limit: int = 0) -> Iterator[Detail]:
        """Yields the examples, at most `limit` (0 = all). Call it once.

        The others are built too where only that tells whether they match; else they are counted in the stores.
        """
        found = self._matching(read_details(self._subject, self._wanted))
        if self._filters.longest:
            found = iter(heapq.nlargest(self._filters.longest, found, key=lambda detail: len(detail.ids)))
        for number, detail in enumerate(found, start=1):
            yield detail
            if number == limit:
                break
        if self._filters.of_examples() or self._filters.row:
            collections.deque(found, maxlen=0)  # counts them
        else:
            self.matched = self.of = sum(len(item.store) + len(item.store.bad_rows) for item, _ in self._wanted)

    def _matching(self, details: Iterable[Detail]) -> Iterator[Detail]:
        filters = self._filters
        for detail in details:
            self.of += 1
            if filters.cut and not (detail.kind == "cut" or detail.shortened):
                continue
            if filters.zero_weight and detail.trained:
                continue
            if filters.problems and not detail.problem:
                continue
            if self._pattern and not (self._pattern.search(detail.text) or self._pattern.search(detail.problem)):
                continue
            self.matched += 1
            yield detail


def find_sets(subject: Subject, name: str) -> list[InspectedSet]:
    """Returns the sets called `name`, all for "". Raises UserError where there is none."""
    found = [item for item in subject.sets if not name or item.name == name]
    if not found:
        raise UserError(f"--set: there is no data set '{name}'; {did_you_mean(name, {item.name for item in subject.sets})}.")
    return found


def wanted_rows(subject: Subject, filters: Filters) -> Wanted:
    """Returns the rows that `set` and `row` name. Raises UserError where there are none."""
    sets = find_sets(subject, filters.set)
    if not filters.row:
        return [(item, np.arange(len(item.rows))) for item in sets]
    file, _, line = filters.row.rpartition(":")
    if not line.isdecimal():
        raise UserError(
            f"--row: '{filters.row}' is neither the number of a row nor file:line; write --row=17 or --row=train.jsonl:17."
        )
    number = int(line)
    if not file:
        wanted = [(item, np.array([number - 1])) for item in sets if 1 <= number <= len(item.rows)]
        if not wanted:
            most = max(len(item.rows) for item in sets)
            raise UserError(f"--row: there is no row {number}; rows are numbered from 1 to {most:,}.")
        return wanted
    wanted = [(item, rows) for item in sets if len(rows := _rows_at(item, file, number))]
    if not wanted:
        files = sorted({name for item in sets for name in item.rows.names})
        if not any(_is_file(name, file) for name in files):
            raise UserError(
                f"--row: no data set has a file '{file}'; {did_you_mean(file, {os.path.basename(name) for name in files})}."
            )
        raise UserError(f"--row: no row begins at line {number} of {file}.")
    return wanted


def _rows_at(item: InspectedSet, file: str, line: int) -> np.ndarray:
    """Returns the numbers of the rows that begin at a line of a file, which may be given by the end of its path."""
    rows, order = item.rows, {name: index for index, name in enumerate(item.rows.names)}

    def place(number: int) -> tuple[int, int]:
        where = rows.where(number)
        return order[where.file], where.line

    wanted = [(index, line) for name, index in order.items() if _is_file(name, file)]
    found = [(at, bisect.bisect_left(range(len(rows)), at, key=place)) for at in wanted]
    return np.array([number for at, number in found if number < len(rows) and place(number) == at], np.int64)


def _is_file(name: str, asked: str) -> bool:
    return name == asked or name.endswith(f"/{asked}")


def _pattern(filters: Filters) -> re.Pattern | None:
    if filters.search and filters.regex:
        raise UserError("--search, --regex: only one of them; --regex 'one|two' finds either of two texts.")
    try:
        return (
            re.compile(filters.regex)
            if filters.regex
            else re.compile(re.escape(filters.search), re.I)
            if filters.search
            else None
        )
    except re.error as error:
        raise UserError(f"--regex: '{filters.regex}' is no regular expression ({error}); --search finds plain text.") from error
