"""What the rows of a run say: keys of prompts and answers of all, and the texts of those that are shown. Read by workers."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sft_jax.config import ColumnsConfig, DataConfig, DataSetConfig
from sft_jax.data.examples import RowError
from sft_jax.data.stores.build import describe
from sft_jax.data.stores.maker import cores
from sft_jax.data.stores.workers import Failure, WorkerPool
from sft_jax.doctor.collection import Collection, open_collection, read_texts
from sft_jax.doctor.personal_data import mask, snippet
from sft_jax.doctor.texts import Texts, key_of
from sft_jax.dynamics.parts import Documents
from sft_jax.errors import UserError
from sft_jax.printable import printable

TARGET = "sft_jax.dynamics.row_texts:RowReader"  # what workers run
CHUNK = 256  # rows that go to a worker at once
MISSING = "(none)"  # the slice of a row without the column
_VALUE_CHARACTERS = 80
_Item = tuple[int, int, dict[str, Any] | RowError]  # row over all sets, number of its set, the row


class RowFacts(NamedTuple):
    """What is told of a row."""

    prompt: int  # a key of all before the last answer; 0 where there is no answer
    answer: int  # a key of the last answer
    slice: str  # the value of the column that slices are made by, "" where none is asked for
    shown: tuple[str, str]  # beginning of the last prompt and answer, masked and printable; "" unless asked for
    problem: str = ""  # why it cannot be read


class Setup(NamedTuple):
    """What a worker needs to know."""

    sets: tuple[tuple[str, ColumnsConfig], ...]  # (format, columns) of every set
    column: str
    show: bool


class RowReader:
    """Run by workers: rows in, facts out."""

    def __init__(self, setup: Setup):
        self._setup = setup

    def __call__(self, items: list[_Item]) -> list[RowFacts]:
        return [self._facts(*item) for item in items]

    def _facts(self, row_number: int, set_number: int, row: dict[str, Any] | RowError) -> RowFacts:
        format_, columns = self._setup.sets[set_number]
        try:
            texts = read_texts(row, format_, columns, "train")
        except RowError as error:
            return RowFacts(0, 0, "", ("", ""), str(error))
        column = self._setup.column
        shown = (snippet(texts.question or texts.prompt), snippet(texts.answer or texts.body)) if self._setup.show else ("", "")
        return RowFacts(*_keys(texts), slice_value(row, column) if column else "", shown)


def _keys(texts: Texts) -> tuple[int, int]:
    if not texts.answers or not texts.prompt.strip():
        return 0, 0
    return key_of(texts.system, texts.apart, texts.prompt), key_of(" ".join(texts.answer.split()))


def slice_value(row: dict[str, Any], column: str) -> str:
    """Returns the value of a column as the name of a slice; dots lead into objects, such as "meta.source".

    >>> slice_value({"meta": {"source": "web", "tags": ["a"]}}, "meta.source")
    'web'
    """
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    text = value if isinstance(value, str) else MISSING if value is None else json.dumps(value, default=str)
    text = printable(mask(" ".join(text.split())))
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]}..."


class RunRows:
    """The rows of some data sets of a run, numbered over all of them."""

    def __init__(self, data: DataConfig, split: Literal["train", "eval"], sets: Sequence[DataSetConfig], log: Callable[[str], None]):
        """Opens `sets`, which are those of `data.train` or `data.eval`, in their order."""
        chosen = {"train": (), "eval": (), split: tuple(sets)}
        self._data = data
        self._rows: Collection = open_collection(dataclasses.replace(data, **chosen), (), log)
        self.bases = self._rows.bases  # [sets + 1]

    @property
    def fingerprints(self) -> list[tuple[str, str]]:
        """(key, fingerprint of its files) of each set."""
        return [(item.key, item.rows.fingerprint) for item in self._rows.sets]

    def __len__(self) -> int:
        return len(self._rows)

    def facts(self, column: str = "", note: Callable[[int], None] = lambda rows: None) -> Iterator[tuple[int, RowFacts]]:
        """Yields (row, facts) of all rows in order, with the slice that they are in by `column`; `note` counts rows."""
        yield from self._read(self._rows.chunks(CHUNK), len(self), Setup(self._formats, column, show=False), note)

    def columns(self) -> list[str]:
        """Returns the names of the fields of the first row of each set, printable."""
        firsts = [self._row(int(base)) for base, item in zip(self.bases, self._rows.sets, strict=False) if len(item.rows)]
        names = dict.fromkeys(name for row in firsts if isinstance(row, dict) for name in row)
        return [printable(mask(str(name)))[:_VALUE_CHARACTERS] for name in names]

    def shown(self, rows: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Returns the beginnings of prompt and answer of some rows, masked and printable."""
        wanted = sorted(set(rows))
        items = [(row, self._rows.set_number(row), self._row(row)) for row in wanted]
        chunks = [items[first : first + CHUNK] for first in range(0, len(items), CHUNK)]
        return {row: found.shown for row, found in self._read(chunks, len(items), Setup(self._formats, "", show=True))}

    @property
    def _formats(self) -> tuple[tuple[str, ColumnsConfig], ...]:
        return tuple((item.format, item.columns) for item in self._rows.sets)

    def _row(self, row: int) -> dict[str, Any] | RowError:
        try:
            return self._rows.row(row)
        except RowError as error:
            return error

    def _read(
        self, chunks: Iterable[list[_Item]], count: int, setup: Setup, note: Callable[[int], None] = lambda rows: None
    ) -> Iterator[tuple[int, RowFacts]]:
        if not count:
            return
        processes = min(self._data.workers or cores(), -(-count // CHUNK))
        with WorkerPool(TARGET, setup, processes, self._data.row_timeout, self._data.row_memory_mb) as pool:
            for items, outcome in pool.run(chunks):
                if isinstance(outcome, Failure):
                    outcome = [RowFacts(0, 0, "", ("", ""), f"reading it {describe(outcome)}")]
                for (row, _, _), found in zip(items, outcome, strict=True):
                    yield row, found
                note(len(items))


def open_training_rows(data: DataConfig, documents: Documents, log: Callable[[str], None]) -> RunRows:
    """Opens the rows of the training sets. Raises UserError where they are not those that the run was trained on."""
    formats = {entry["name"]: entry["format"] for entry in documents.sets}
    rows = RunRows(data, "train", [dataclasses.replace(item, format=formats[item.name]) for item in data.train], log)
    for entry, (key, fingerprint) in zip(documents.sets, rows.fingerprints, strict=True):
        if fingerprint != entry["rows"]:
            raise UserError(f"{key}: its files are not those that this run was trained on; restore them.")
    return rows


def row_numbers(documents: Documents, bases: np.ndarray) -> np.ndarray:
    """Returns the row over all sets that each document is of, int64 [documents]."""
    return bases[documents.set] + documents.row
