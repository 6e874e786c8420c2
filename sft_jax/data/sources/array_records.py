"""ArrayRecord files: records of JSON text or tf.train.Example, without TensorFlow."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError

from sft_jax.data.examples import RowError
from sft_jax.data.sources.json_rows import parse_row, text_or_bytes
from sft_jax.data.sources.parts import File, Row
from sft_jax.data.sources.pieces import State, changed, damaged, file_sha256, no_longer_read, state_of
from sft_jax.errors import UserError

BLOCK = 1024  # records that are read at a time
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # of random access, in this thread


class RecordFile:
    """A Part whose rows are [skip, skip + count) of the `available` records of an ArrayRecord file, which `parse` reads."""

    def __init__(
        self, file: File, state: State, content: str, available: int, skip: int, count: int, parse: Callable[[bytes], Row]
    ):
        """`state` is that of the file before `content` was told from it."""
        self.name, self._path, self._blocks = file.name, file.path, file.shared.blocks
        self.size, self.content, self._state = state.size, content, state
        self._available, self._skip, self._count, self._parse = available, skip, count, parse

    def __len__(self) -> int:
        return self._count

    def lines(self, rows: np.ndarray) -> np.ndarray:
        return self._skip + rows + 1

    def unparsed(self, first: int, stop: int) -> list[Row | RowError]:
        return self.read(first, stop)

    def read(self, first: int, stop: int) -> list[Row | RowError]:
        rows: list[Row | RowError] = []
        for record in range(self._skip + first, self._skip + stop):
            block = self._blocks.get((self._path, record // BLOCK), partial(self._load, record // BLOCK))
            try:
                rows.append(self._parse(block[record % BLOCK]))
            except RowError as error:
                rows.append(error)
        return rows

    def _load(self, block: int) -> tuple[list[bytes], int]:
        try:
            if state_of(self._path) != self._state:
                raise changed(self.name)
            reader = ArrayRecordReader(self._path, _OPTIONS)
            try:
                if reader.num_records() != self._available:
                    raise changed(self.name)
                records = reader.read(block * BLOCK, min((block + 1) * BLOCK, self._available))
            finally:
                reader.close()
        except OSError as error:
            raise no_longer_read(self.name, error) from error
        except (RuntimeError, IndexError) as error:
            raise damaged(self.name, error) from error
        return records, sum(map(len, records))


def open_array_record(file: File) -> RecordFile:
    """Opens an ArrayRecord file. Raises UserError where it is none."""
    count, state = record_count(file), state_of(file.path)
    return RecordFile(file, state, f"array_record {file_sha256(file.path)}", count, 0, count, parse_record)


def record_count(file: File) -> int:
    """Returns how many records a file has. Raises UserError where it is empty, damaged or no ArrayRecord file."""
    if not os.path.getsize(file.path):
        raise UserError(f"{file.label}: is empty; leave it out, or write it again.")
    with open(file.path, "rb"):  # raises OSError; the reader tells nothing of a file that may not be read
        pass
    try:
        reader = ArrayRecordReader(file.path, _OPTIONS)
        try:
            count = reader.num_records()
        finally:
            reader.close()
    except RuntimeError as error:
        raise damaged(file.label, error) from error
    if not count:  # the reader says so of anything whose end is not that of an ArrayRecord file
        raise UserError(f"{file.label}: holds no records, or is not a whole ArrayRecord file; copy it again.")
    return count


def parse_record(record: bytes) -> Row:
    """Returns the row in a record, a JSON object or a tf.train.Example. Raises RowError.

    A feature of an Example with one value is that value, one with more a list: the two are written alike. Bytes are text
    where they are UTF-8.
    """
    looks_like_json = record.lstrip()[:1] == b"{"
    if looks_like_json and record[:1] != b"\n":  # the byte with which an Example begins
        return parse_row(record)
    from tensorflow_datasets.proto import tf_example_pb2  # here: it takes half a second, and few data sets need it

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        if looks_like_json:
            return parse_row(record)
        raise RowError("is neither a JSON object nor a tf.train.Example; write each record as JSON text.") from error
    if not features and looks_like_json:
        return parse_row(record)
    if not features:
        raise RowError("holds no field: it is neither a JSON object nor a tf.train.Example with features.")
    return {name: _feature(features[name]) for name in sorted(features)}


def _feature(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    values = [text_or_bytes(value) if kind == "bytes_list" else value for value in getattr(feature, kind).value] if kind else []
    return values[0] if len(values) == 1 else values
