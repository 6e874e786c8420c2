"""All rows that are looked at, under one numbering: held-out sets and benchmarks first, so that training rows meet them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sft_jax.config import ColumnsConfig, DataConfig, DataSetConfig, data_set_key
from sft_jax.data.examples import RowError
from sft_jax.data.formats.detection import resolve_format
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.prepare import cache_folder
from sft_jax.data.sources.registry import Rows, Where, open_rows
from sft_jax.doctor.texts import Texts, texts_of, texts_of_fields
from sft_jax.errors import UserError

Split = Literal["train", "eval", "benchmark"]
PLAIN_FORMATS = ("text", "segments", "tokens")  # that no chat template renders


@dataclass(frozen=True)
class InputSet:
    """A data set, or a file of a benchmark."""

    key: str  # such as "data.train.code", for messages
    split: Split
    rows: Rows
    format: str  # of FORMATS, or "" where all text of a row is taken
    columns: ColumnsConfig
    rendered: bool = False  # whether its rows go through a chat template, which writes marks of its own


def read_texts(row: dict[str, Any] | RowError, format_: str, columns: ColumnsConfig, split: Split) -> Texts:
    """Returns the texts of a row. Raises RowError, but for an object of a benchmark, of which all text is taken then."""
    if isinstance(row, RowError):
        raise row
    try:
        if format_:
            return texts_of(FORMATS[format_].read(row, columns))
    except RowError:
        if split != "benchmark":
            raise
    return texts_of_fields(row)


class Collection:
    """The rows of several sets, numbered from 0 over all of them. Made by `open_collection`."""

    def __init__(self, sets: Sequence[InputSet]):
        self.sets = tuple(sets)
        self.bases = np.concatenate([[0], np.cumsum([len(item.rows) for item in sets])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.bases[-1])

    def set_number(self, row: int) -> int:
        """Returns the number of the set that a row is of."""
        return int(np.searchsorted(self.bases, row, side="right")) - 1

    def set_of(self, row: int) -> InputSet:
        """Returns the set that a row is of."""
        return self.sets[self.set_number(row)]

    def where(self, row: int) -> Where:
        """Returns the file and line of a row."""
        number = self.set_number(row)
        return self.sets[number].rows.where(row - int(self.bases[number]))

    def row(self, row: int) -> dict[str, Any]:
        """Returns a row as it is in its file. Raises RowError."""
        number = self.set_number(row)
        return self.sets[number].rows[row - int(self.bases[number])]

    def texts(self, row: int) -> Texts:
        """Returns the texts of a row. Raises RowError."""
        item = self.set_of(row)
        return read_texts(self.row(row), item.format, item.columns, item.split)

    def chunks(self, size: int) -> Iterator[list[tuple[int, int, dict[str, Any] | RowError]]]:
        """Yields all rows in order, `size` at a time and never two sets at once, as (number, number of the set, row)."""
        for number, item in enumerate(self.sets):
            base = int(self.bases[number])
            for first in range(0, len(item.rows), size):
                found = item.rows.read(first, min(first + size, len(item.rows)))
                yield [(base + first + place, number, row) for place, row in enumerate(found)]


def open_collection(config: DataConfig, benchmark: Sequence[str], log: Callable[[str], None]) -> Collection:
    """Opens the sets of `data.train` and `data.eval`, and the files of a benchmark.

    Raises UserError as `open_rows` and `resolve_format` do. The rows of a benchmark may have any fields.
    """
    cache = cache_folder(config)

    def open_set(split: Literal["train", "eval"], index: int, item: DataSetConfig, count: int) -> InputSet:
        key = data_set_key(split, index, item.name, count)
        rows = open_rows(item.path, key, cache, log)
        format_ = resolve_format(item.format, rows, item.columns, skip_bad_rows=True)
        rendered = config.chat_template != "none" and format_ not in PLAIN_FORMATS
        return InputSet(key, split, rows, format_, item.columns, rendered)

    held_out = [open_set("eval", index, item, len(config.eval)) for index, item in enumerate(config.eval)]
    train = [open_set("train", index, item, len(config.train)) for index, item in enumerate(config.train)]
    extra = []
    if benchmark:
        rows = open_rows(benchmark, "--benchmark", cache, log)
        try:
            format_ = resolve_format("auto", rows, ColumnsConfig(), skip_bad_rows=True)
        except UserError:  # none of our formats: all its text counts
            format_ = ""
        extra = [InputSet("--benchmark", "benchmark", rows, format_, ColumnsConfig())]
    return Collection([*held_out, *extra, *train])
