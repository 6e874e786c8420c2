"""Files in which a row is a range of bytes: JSON and CSV, also packed."""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sft_jax.data.examples import RowError
from sft_jax.data.sources.parts import File, Row, Unparsed
from sft_jax.data.sources.pieces import Piece, changed, packing
from sft_jax.errors import UserError

BOM = b"\xef\xbb\xbf"
_SHARD = re.compile(r"-\d+-of-\d+$")
UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Index(NamedTuple):
    """Row i is bytes [starts[i], ends[i]) and begins on line lines[i], counted from 1."""

    starts: np.ndarray  # int64 [n]
    ends: np.ndarray  # int64 [n]
    lines: np.ndarray  # int64 [n]


class TextFile:
    """A Part whose rows are ranges of bytes, which `parse` reads; it raises RowError."""

    def __init__(self, file: File, size: int, content: str, index: Index, parse: Callable[[bytes], Row]):
        self.name, self.size, self.content = file.name, size, content
        self._path, self._pieces, self._index, self._parse = file.path, file.shared.pieces, index, parse

    def __len__(self) -> int:
        return len(self._index.starts)

    def lines(self, rows: np.ndarray) -> np.ndarray:
        return self._index.lines[rows]

    def read(self, first: int, stop: int) -> list[Row | RowError]:
        return [row.read() for row in self.unparsed(first, stop)]

    def unparsed(self, first: int, stop: int) -> list[Unparsed]:
        starts, ends = self._index.starts[first:stop], self._index.ends[first:stop]
        begin, end = int(starts[0]), int(ends[-1])
        data = self._pieces.reopen(self._path, self.name, self.size).read(begin, end - begin)
        if len(data) != end - begin:
            raise changed(self.name)
        ranges = zip((starts - begin).tolist(), (ends - begin).tolist(), strict=True)
        return [Unparsed(data[start:stop], self._parse) for start, stop in ranges]


def begin_of_text(piece: Piece, label: str) -> int:
    """Returns the byte at which a text begins, behind a mark of UTF-8. Raises UserError for UTF-16."""
    head = piece.read(0, len(BOM))
    if head.startswith(UTF16):
        raise UserError(f"{label}: is in UTF-16; save it as UTF-8.")
    return len(BOM) if head.startswith(BOM) else 0


def suffix_of(path: str) -> str:
    """Returns the suffix of a file without that of its packing and without a number of a shard, in lower case.

    >>> suffix_of("rows.JSONL.gz"), suffix_of("rows.array_record-00000-of-00002")
    ('.jsonl', '.array_record')
    """
    path = path.lower()
    return os.path.splitext(_SHARD.sub("", path.removesuffix(packing(path))))[1]
