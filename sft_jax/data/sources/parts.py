"""What a data set is made of: parts, each a file or one of its kind, whose rows can be read in any order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from sft_jax.data.examples import RowError
from sft_jax.data.sources.pieces import Pieces

Row = dict[str, Any]
CACHED_BYTES = 1 << 28  # of blocks that one Blocks keeps
CACHED_BLOCKS = 64


class Unparsed(NamedTuple):
    """A row as it stands in its file, which can be sent to a process that reads it."""

    data: bytes
    parse: Callable[[bytes], Row]  # raises RowError; can be pickled

    def read(self) -> Row | RowError:
        """Returns the row; where it cannot be used, the error that says why."""
        try:
            return self.parse(self.data)
        except RowError as error:
            return error


class Part(Protocol):
    """A file of rows, or what is like one. Its rows are numbered from 0."""

    name: str  # as the user knows it
    size: int  # bytes, unpacked
    content: str  # hash of all that decides the rows

    def __len__(self) -> int: ...

    def read(self, first: int, stop: int) -> list[Row | RowError]:
        """Returns the rows [first, stop); for one that cannot be used, the error that says why. Raises UserError."""

    def unparsed(self, first: int, stop: int) -> list[Row | RowError | Unparsed]:
        """Returns the same rows, as they stand in the file where that costs less than reading them."""

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """Returns the line on which each row begins, int64 [rows]; where there are no lines its number, counted from 1."""


class Blocks:
    """The blocks of rows (row groups, record batches) that were read last, of all parts: their bytes are bounded."""

    def __init__(self):
        self._held: dict[Any, tuple[Any, int]] = {}  # the one used last at the end
        self._bytes = 0

    def get(self, key: Any, load: Callable[[], tuple[Any, int]]) -> Any:
        """Returns the block that `load` makes, with its bytes, unless it is here."""
        if key in self._held:
            self._held[key] = self._held.pop(key)
            return self._held[key][0]
        block, size = load()
        while self._held and (self._bytes + size > CACHED_BYTES or len(self._held) >= CACHED_BLOCKS):
            self._bytes -= self._held.pop(next(iter(self._held)))[1]
        self._held[key] = block, size
        self._bytes += size
        return block


class Shared(NamedTuple):
    """What all parts of one Rows have together."""

    pieces: Pieces
    blocks: Blocks
    cache: Path  # folder for copies of what is not on this disk
    log: Callable[[str], None]


class File(NamedTuple):
    """A file that is to be opened."""

    name: str  # as the user knows it
    label: str  # name for messages while files are opened: with the key that named it
    path: str
    shared: Shared
