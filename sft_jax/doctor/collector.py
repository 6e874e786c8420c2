"""Takes what checks report: every fault is counted, the first ones are kept with their details."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from sft_jax.doctor.checks import CHECKS
from sft_jax.doctor.collection import Collection
from sft_jax.doctor.findings import LISTED, Finding, KindResult
from sft_jax.doctor.set_checks import set_ranges
from sft_jax.printable import printable

LONGEST = 500  # characters of a detail
MANY = 10  # rows of a set that must have a fault before it can be usual there


class Collector:
    """The faults of all rows: a byte for each row and kind, and the details of the first in each set.

    Args:
        rows: what is looked at.
        keep_all: kinds of which every detail is kept, such as those that a cleaned copy is made without.
        counted: kinds that are counted even where most rows of a set have them, such as those that a limit names.
        listed: details that are kept of each kind and set, and findings that are told of each kind.
    """

    def __init__(self, rows: Collection, keep_all: Iterable[str] = (), counted: Iterable[str] = (), listed: int = LISTED):
        self._rows, self._keep_all, self._counted, self._listed = rows, frozenset(keep_all), frozenset(counted), listed
        self._faulty = {kind: np.zeros(len(rows), bool) for kind in CHECKS}
        self._details: dict[str, dict[int, str]] = {kind: {} for kind in CHECKS}
        self._kept: Counter[tuple[str, int]] = Counter()  # details by kind and set
        self._usual: dict[str, tuple[str, ...]] = dict.fromkeys(CHECKS, ())

    def add(self, kind: str, row: int, detail: str) -> None:
        """Counts a fault of a row. More than one of a kind are one faulty row with several details."""
        self._faulty[kind][row] = True
        details = self._details[kind]
        if row in details:
            if len(details[row]) < LONGEST:
                details[row] += f"; {detail}"
            return
        of_set = kind, self._rows.set_number(row)
        if kind in self._keep_all or self._kept[of_set] < self._listed:
            details[row] = detail
            self._kept[of_set] += 1

    def close(self) -> None:
        """Takes back what a set is like in most rows, of kinds that can be usual. Call when all is reported."""
        for kind, check in CHECKS.items():
            for begin, end in set_ranges(self._rows):
                rows, item = self._faulty[kind][begin:end], self._rows.set_of(begin)
                if kind in self._counted or item.rendered and not check.usual_where_rendered:
                    continue
                if rows.sum() >= MANY and rows.sum() > check.usual * len(rows):
                    rows[:] = False
                    self._usual[kind] += (item.key,)
            faulty = self._faulty[kind]
            self._details[kind] = {row: detail for row, detail in sorted(self._details[kind].items()) if faulty[row]}

    def results(self) -> dict[str, KindResult]:
        """Returns what was found of every kind. Training rows are listed first."""
        results = {}
        for kind, check in CHECKS.items():
            listed = sorted(
                self._details[kind].items(), key=lambda item: (self._rows.set_of(item[0]).split != "train", item[0])
            )
            findings = tuple(
                Finding(*self._rows.where(row), self._rows.set_of(row).key, shorten(detail)) for row, detail in listed[: self._listed]
            )
            results[kind] = KindResult(check.severity, check.about, int(self._faulty[kind].sum()), findings, self._usual[kind])
        return results

    def faults(self, row: int, kinds: Iterable[str]) -> list[tuple[str, str]]:
        """Returns (kind, detail) of a row, of kinds of which all details are kept."""
        return [(kind, shorten(self._details[kind][row])) for kind in kinds if self._faulty[kind][row]]


def shorten(detail: str) -> str:
    """Returns a detail of bounded length, in one line that can be shown everywhere."""
    line = " ".join(printable(detail).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
