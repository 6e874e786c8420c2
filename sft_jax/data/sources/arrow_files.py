"""Parquet and Arrow files. They are read a row group or a record batch at a time."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_jax.data.examples import RowError, in_message
from sft_jax.data.sources.arrow_values import table_rows
from sft_jax.data.sources.parts import File, Row
from sft_jax.data.sources.pieces import changed, damaged, file_sha256, no_longer_read, state_of
from sft_jax.errors import UserError, reason_of

_ARROW_FILE = b"ARROW1"  # Arrow's file format, which is Feather's too, begins with it; else it is a stream
_Load = Callable[[int], pa.Table]


class TableFile:
    """A Part whose rows are in blocks that are read whole: `load(i)` is block i, with `counts[i]` rows."""

    def __init__(self, file: File, kind: str, counts: list[int], load: _Load):
        self.name, self._path, self._blocks, self._load = file.name, file.path, file.shared.blocks, load
        self._state = state_of(file.path)
        self.size = self._state.size
        self.content = f"{kind} {file_sha256(file.path)}"
        self._bases = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._bases[-1])

    def lines(self, rows: np.ndarray) -> np.ndarray:
        return rows + 1

    def unparsed(self, first: int, stop: int) -> list[Row | RowError]:
        return self.read(first, stop)

    def read(self, first: int, stop: int) -> list[Row | RowError]:
        rows: list[Row | RowError] = []
        while first < stop:
            block = int(np.searchsorted(self._bases, first, side="right")) - 1
            begin, end = int(self._bases[block]), int(self._bases[block + 1])
            count = min(stop, end) - first
            rows += table_rows(self._block(block).slice(first - begin, count), self.name)
            first += count
        return rows

    def _block(self, number: int) -> pa.Table:
        def load() -> tuple[pa.Table, int]:
            try:
                if state_of(self._path) != self._state:
                    raise changed(self.name)
                table = self._load(number)
            except (pa.ArrowException, ValueError) as error:
                raise damaged(self.name, error) from error
            except OSError as error:  # pyarrow raises it for damage too, but then without a number
                raise (no_longer_read if error.errno else damaged)(self.name, error) from error
            if table.num_rows != self._bases[number + 1] - self._bases[number]:
                raise changed(self.name)
            return table, table.nbytes

        return self._blocks.get((self._path, number), load)


def open_parquet(file: File) -> TableFile:
    """Opens a Parquet file. Raises UserError where it is none, or cut short."""
    with _whole(file, "Parquet"):
        metadata = pq.read_metadata(file.path)
        _check_names(file, metadata.schema.to_arrow_schema())
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def load(group: int) -> pa.Table:
        with pq.ParquetFile(file.path, metadata=metadata, page_checksum_verification=True) as opened:
            return opened.read_row_group(group)

    return TableFile(file, "parquet", counts, load)


def open_arrow(file: File) -> TableFile:
    """Opens a file of Arrow IPC, in its file format (Feather 2) or as a stream. Raises UserError where it is none."""
    with _whole(file, "Arrow"), open(file.path, "rb") as opened:
        if opened.read(len(_ARROW_FILE)) == _ARROW_FILE:
            with pa.OSFile(file.path) as source:
                reader = pa.ipc.open_file(source)
                _check_names(file, reader.schema)
                counts = [reader.get_batch(batch).num_rows for batch in range(reader.num_record_batches)]
            load = _batch_of_file
        else:
            with pa.OSFile(file.path) as source:
                schema = pa.ipc.open_stream(source).schema
                _check_names(file, schema)
                offsets, counts = _batches(source, schema, file.label)
            load = lambda path, batch: _batch_of_stream(path, schema, offsets[batch])  # noqa: E731
    return TableFile(file, "arrow", counts, lambda batch: load(file.path, batch))


def _batch_of_file(path: str, batch: int) -> pa.Table:
    with pa.OSFile(path) as source:
        return _checked(pa.ipc.open_file(source).get_batch(batch))


def _batch_of_stream(path: str, schema: pa.Schema, offset: int) -> pa.Table:
    with pa.OSFile(path) as source:
        source.seek(offset)
        return _checked(pa.ipc.read_record_batch(pa.ipc.read_message(source), schema))


def _checked(batch: pa.RecordBatch) -> pa.Table:
    """Returns a batch as a table. Its buffers are those of the file, where damaged offsets would point anywhere."""
    batch.validate(full=True)
    return pa.Table.from_batches([batch])


def _batches(source: pa.NativeFile, schema: pa.Schema, label: str) -> tuple[list[int], list[int]]:
    """Returns the byte at which each record batch of a stream begins, and its rows. `source` is behind the schema."""
    offsets, counts = [], []
    while True:
        offset = source.tell()
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            if offset == source.size():  # it may have lost batches, of which nothing else would tell
                raise pa.ArrowInvalid("the mark of its end is missing") from None
            return offsets, counts
        if message.type == "dictionary":
            raise UserError(
                f"{label}: is an Arrow stream with dictionary columns, whose batches cannot be read on their own; save it as "
                "Parquet."
            )
        offsets.append(offset)
        counts.append(pa.ipc.read_record_batch(message, schema).num_rows)


@contextmanager
def _whole(file: File, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises for a file that is none of its kind into UserError; one without a byte is empty."""
    if not os.stat(file.path).st_size:
        raise UserError(f"{file.label}: is empty; leave it out, or write it again.")
    try:
        yield
    except (pa.ArrowException, ValueError, EOFError) as error:
        raise _not_whole(file, kind, error) from error
    except OSError as error:
        if error.errno:
            raise
        raise _not_whole(file, kind, error) from error


def _not_whole(file: File, kind: str, error: Exception) -> UserError:
    return UserError(f"{file.label}: is not a whole {kind} file ({reason_of(error)}); copy it again.")


def _check_names(file: File, schema: pa.Schema) -> None:
    seen: set[str] = set()
    for name in schema.names:
        if name in seen or seen.add(name):
            raise UserError(f"{file.label}: has two columns named '{in_message(name)}'; names must differ.")
