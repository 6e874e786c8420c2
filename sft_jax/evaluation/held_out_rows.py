"""The rows of a held-out set with all their columns, as its files have them, by document."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_jax.config import DataConfig, DataSetConfig, data_set_key
from sft_jax.data.examples import RowError
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.prepare import cache_folder
from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError, did_you_mean

_BLOCK = 512  # rows that are read together
_MOST_SLICES = 100
_ABSENT = object()


Slices = dict[str, dict[str, np.ndarray]]  # by column and value, the documents of a set


def slices_of(streams: Mapping[str, RowStream], config: DataConfig, columns: Sequence[str], key: str) -> dict[str, Slices]:
    """Returns the documents of every set by the values of these columns. Raises UserError, which names `key`, for one that is none."""
    found: dict[str, Slices] = {}
    for name, stream in streams.items() if columns else ():
        held = HeldOutRows(stream, config, name)
        try:
            found[name] = {column: held.slices(column) for column in columns}
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return found


class HeldOutRows:
    """Reads rows of one set of data.eval."""

    def __init__(self, stream: RowStream, config: DataConfig, name: str):
        """Opens the files of the set `name`, of which `stream` has the documents."""
        index = [item.name for item in config.eval].index(name)
        self.config: DataSetConfig = config.eval[index]
        self.key = data_set_key("eval", index, name, len(config.eval))
        self._stream = stream
        self._rows = open_rows(self.config.path, self.key, cache_folder(config), lambda line: None)
        (store,) = stream.corpus.stores
        self.format: str = store.meta["format"]
        self._row_of = store.rows.whole()[stream.documents.example]  # of each document

    def rows(self, documents: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the row of each of these documents."""
        wanted = self._row_of[np.asarray(documents, np.int64)]
        found: dict[int, dict[str, Any]] = {}
        needed = np.unique(wanted)
        for part in np.split(needed, np.flatnonzero(np.diff(needed) != 1) + 1) if len(needed) else ():
            for first in range(int(part[0]), int(part[-1]) + 1, _BLOCK):
                rows = self._rows.read(first, min(first + _BLOCK, int(part[-1]) + 1))
                for number, row in enumerate(rows, first):
                    if isinstance(row, RowError):  # it was read when it was prepared
                        raise UserError(f"{self._rows.where(number)}: {row} The file has changed; start again.")
                    found[number] = row
        return [found[number] for number in wanted.tolist()]

    def where(self, document: int) -> str:
        """Returns "file:line" of the row of a document."""
        return str(self._rows.where(int(self._row_of[document])))

    def column(self, name: str) -> list[Any]:
        """Returns the value of a column in the row of every document, `None` where a row has it not.

        A dot leads into an object, where no column has the whole name. Raises UserError where no row has the column.
        """
        values, known = [], set()
        for first in range(0, len(self._row_of), _BLOCK):
            for row in self.rows(range(first, min(first + _BLOCK, len(self._row_of)))):
                values.append(_value(row, name))
                known.update(map(str, row))
        if all(value is _ABSENT for value in values):
            raise UserError(f"{self.key}: no row has the column '{name}'; {did_you_mean(name, sorted(known))}.")
        return [None if value is _ABSENT else value for value in values]

    def slices(self, name: str) -> dict[str, np.ndarray]:
        """Returns the indices of the documents by the value of a column, as text; `null` where a row has none.

        Raises UserError for a column with more values than a table can show.
        """
        texts = np.array([value if isinstance(value, str) else json.dumps(value, default=str) for value in self.column(name)], object)
        distinct = sorted(set(texts.tolist()))
        if len(distinct) > _MOST_SLICES:
            raise UserError(
                f"{self.key}: the column '{name}' has {len(distinct):,} values, such as {distinct[0]!r:.60}; slices are made by one with "
                f"at most {_MOST_SLICES}, such as a source or a category."
            )
        return {text: np.flatnonzero(texts == text) for text in distinct}


def _value(row: dict[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    for part in name.split("."):
        if not isinstance(row, dict) or part not in row:
            return _ABSENT
        row = row[part]
    return row
