"""Rows of every kind of data: any row by its number, and the file and line that it came from."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.data.cache import default_cache
from sft_jax.data.examples import RowError
from sft_jax.data.sources import remote
from sft_jax.data.sources.array_records import open_array_record
from sft_jax.data.sources.arrow_files import open_arrow, open_parquet
from sft_jax.data.sources.csv_files import open_csv
from sft_jax.data.sources.hf_sets import is_saved, open_hugging_face, open_saved
from sft_jax.data.sources.json_files import open_json
from sft_jax.data.sources.parts import Blocks, File, Part, Shared, Unparsed
from sft_jax.data.sources.pieces import PACKINGS, Pieces, packing
from sft_jax.data.sources.text_files import suffix_of
from sft_jax.data.sources.tfds_sets import open_tfds
from sft_jax.errors import UserError, reason_of

# A further kind of file is a function and a line. It raises UserError for what is no such file; OSError is told here.
READERS: dict[str, Callable[[File], Part]] = {
    ".jsonl": open_json, ".ndjson": open_json, ".json": open_json, ".csv": open_csv, ".tsv": open_csv,
    ".parquet": open_parquet, ".arrow": open_arrow, ".feather": open_arrow,
    ".array_record": open_array_record, ".arrayrecord": open_array_record,
}  # fmt: skip
PACKED = frozenset((".jsonl", ".ndjson", ".json", ".csv", ".tsv"))  # kinds that are read from .gz and .zst, too
# A further kind of data set, which is named by more than a path: name, label for messages -> its parts.
SETS: dict[str, Callable[[str, str, Shared], list[Part]]] = {"tfds:": open_tfds, "hf:": open_hugging_face}
_HUB_ID = re.compile(r"[\w-]+/[\w-]+")


class Where(NamedTuple):
    """Where a row is from; `str` of it is "file:line", the beginning of every message about the row.

    In files without lines (Parquet, Arrow, ArrayRecord) the line is the number of the row, counted from 1.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Rows(Sequence):
    """The rows of several files in a row, of any kinds, read when they are asked for. Made by `open_rows`.

    However many files there are, few are open at a time, and what is kept of them is bounded. One thread of one process
    reads; workers are sent rows.
    """

    def __init__(self, parts: Sequence[Part], fingerprint: str):
        self.names = tuple(part.name for part in parts)
        self.fingerprint = fingerprint
        self._parts = tuple(parts)
        self._bases = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self._bases[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns row `row`. Raises RowError where it cannot be used, and IndexError beyond the end."""
        (found,) = self.read(row, row + 1)
        if isinstance(found, RowError):
            raise found
        return found

    def read(self, first: int, stop: int) -> list[dict[str, Any] | RowError]:
        """Returns the rows [first, stop), each file read once; for one that cannot be used, the error that says why."""
        return [row for part, start, end in self._ranges(first, stop) for row in part.read(start, end)]

    def unparsed(self, first: int, stop: int) -> list[dict[str, Any] | RowError | Unparsed]:
        """Returns the same rows, as they stand in their files where that costs less than reading them."""
        return [row for part, start, end in self._ranges(first, stop) for row in part.unparsed(start, end)]

    def where(self, row: int) -> Where:
        """Returns the file and the line on which row `row` begins."""
        ((file, line),) = self.places(np.array([row])).tolist()
        return Where(self.names[file], line)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Returns the file (index in `names`) and the line of each row, int64 [rows, 2]. Raises IndexError beyond the end."""
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        files = np.searchsorted(self._bases, rows, side="right") - 1
        lines = np.empty_like(files)
        for file in np.unique(files).tolist():
            own = files == file
            lines[own] = self._parts[file].lines(rows[own] - self._bases[file])
        return np.stack([files, lines], axis=1)

    def _ranges(self, first: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Yields the parts that hold the rows [first, stop), and which of theirs these are."""
        while first < stop:
            number, local = self._find(first)
            part = self._parts[number]
            count = min(stop - first, len(part) - local)
            yield part, local, local + count
            first += count

    def _find(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self._bases, row, side="right")) - 1
        return number, row - int(self._bases[number])


def open_rows(
    paths: Sequence[str], what: str, cache: Path | None = None, log: Callable[[str], None] = print
) -> Rows:
    """Opens files and data sets of the kinds in READERS and SETS as one sequence of rows.

    Args:
        paths: files, globs, URLs of either, folders made by `save_to_disk`, names of SETS, in this order; the matches
            of a glob are sorted by name.
        what: the key that named them, such as "data.train", for messages.
        cache: folder for copies of remote files; None is the user's cache folder.
        log: takes lines about what is copied.

    Raises UserError naming the file and the remedy where one is missing, empty, unreadable or not such a file. A row
    that is malformed raises RowError when it is read, so that a policy can leave it out.
    """
    digest = hashlib.sha256()
    shared = Shared(Pieces(), Blocks(), cache or default_cache(), log)
    parts: list[Part] = []
    for name in _expand(paths, what):
        label = f"{what}: {name}"
        try:
            found = _open(name, label, shared)
        except OSError as error:
            reason = error.strerror or reason_of(error)
            raise UserError(f"{label}: cannot be read ({reason}); check the file and its permissions.") from error
        if not sum(map(len, found)):
            state = "holds no rows" if any(part.size for part in found) else "is empty"
            raise UserError(f"{label}: {state}; leave it out, or write it again.")
        parts += [part for part in found if len(part)]  # of a data set in several files some may hold none
    for part in parts:
        digest.update(f"{part.content}\n".encode())
    return Rows(parts, digest.hexdigest())


def _open(name: str, label: str, shared: Shared) -> list[Part]:
    if kind := _set_of(name):
        return SETS[kind](name, label, shared)
    path = remote.copy(name, label, shared) if remote.is_url(name) else os.path.expanduser(name)
    if os.path.isdir(path):
        return open_saved(path, name, label, shared)
    return [READERS[suffix_of(path)](File(name, label, path, shared))]


def _set_of(name: str) -> str:
    """Returns the prefix in SETS that a name has, or "". A URL has none: hf:// is a file system of fsspec."""
    return next((prefix for prefix in SETS if name.startswith(prefix) and not remote.is_url(name)), "")


def _expand(paths: Sequence[str], what: str) -> list[str]:
    """Returns the files and data sets that `paths` name. Raises UserError where one names none."""
    names = [name for path in paths for name in _matches(path, what)]
    if not names:
        raise UserError(f"{what}: names no file; give a file or a glob of rows.")
    seen: dict[str, str] = {}
    for name in names:
        place = name
        if not _set_of(name):
            place = name if remote.is_url(name) else os.path.realpath(os.path.expanduser(name))
            if not os.path.isdir(place):
                _check_suffix(name, what)
        if place in seen:
            raise UserError(f"{what}: {name}: is the same file as {seen[place]}; name it once.")
        seen[place] = name
    return names


def _matches(path: str, what: str) -> list[str]:
    """Returns the names of files and data sets that one path stands for."""
    if _set_of(path):
        return [path]
    if remote.is_url(path):
        return remote.find(path, f"{what}: {path}")
    full = os.path.expanduser(path)
    if os.path.isdir(full) and not is_saved(full):
        raise UserError(f"{what}: {path}: is a directory; name a file or a glob such as {os.path.join(path, '*.jsonl')}.")
    if os.path.lexists(full):
        return [path]
    if not glob.has_magic(full):
        hint = f" A data set of the Hugging Face hub is written hf:{path}:train." if _HUB_ID.fullmatch(path) else ""
        raise UserError(f"{what}: {path}: there is no such file; check the path.{hint}")
    found = sorted(name for name in glob.glob(full, recursive=True) if not os.path.isdir(name))
    if not found:
        raise UserError(f"{what}: {path}: matches no file; check the path and the pattern.")
    return found


def _check_suffix(name: str, what: str) -> None:
    suffix = suffix_of(name)
    if suffix not in READERS:
        kinds, packed = ", ".join(READERS), ", ".join(PACKINGS)
        raise UserError(
            f"{what}: {name}: is no kind of file that is read here; use {kinds}; those of text also with {packed}."
        )
    if packing(name) and suffix not in PACKED:
        raise UserError(f"{what}: {name}: files of kind {suffix} are not read packed; unpack it first.")
