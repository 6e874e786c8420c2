"""Rows from files: any row by its number, and the file and line that it came from."""

import glob
import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sft_jax.data.examples import RowError
from sft_jax.data.json_files import Index, index_file, unpack
from sft_jax.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json")


class Where(NamedTuple):
    """Where a row is from; `str` of it is "file:line", the beginning of every message about the row."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Rows(Sequence):
    """The rows of several files in a row, read when they are asked for. Made by `open_rows`.

    An object that was sent to another process opens the files there. Objects can be used by several threads.
    """

    def __init__(self, names: Sequence[str], paths: Sequence[str], indices: Sequence[Index], fingerprint: str):
        """`names` are the files as the user knows them; `paths` where their bytes are."""
        self.names = tuple(names)
        self.fingerprint = fingerprint
        self._paths = tuple(paths)
        self._indices = tuple(indices)
        self._sizes = tuple(os.path.getsize(path) for path in paths)
        self._bases = np.concatenate([[0], np.cumsum([len(index.starts) for index in indices])])
        self._maps: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return int(self._bases[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns row `row`. Raises RowError where it is not a JSON object in UTF-8, and IndexError beyond the end."""
        file, local = self._find(row)
        index = self._indices[file]
        data = self._open(file)[int(index.starts[local]) : int(index.ends[local])]
        return parse_row(data)

    def where(self, row: int) -> Where:
        """Returns the file and the line on which row `row` begins."""
        file, local = self._find(row)
        return Where(self.names[file], int(self._indices[file].lines[local]))

    def _find(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        file = int(np.searchsorted(self._bases, row, side="right")) - 1
        return file, row - int(self._bases[file])

    def _open(self, file: int) -> mmap.mmap:
        found = self._maps.get(file)
        if found is None:
            try:
                with open(self._paths[file], "rb") as handle:
                    found = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise UserError(f"{self.names[file]}: can no longer be read ({error}); start again.") from error
            if len(found) != self._sizes[file]:
                raise UserError(f"{self.names[file]}: has changed since it was first read; start again.")
            self._maps[file] = found
        return found


def parse_row(data: bytes) -> dict[str, Any]:
    """Returns the JSON object in `data`. Raises RowError saying what else it is."""
    try:
        row = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(
            f"is not UTF-8 (byte {error.start + 1} of the row is 0x{data[error.start]:02x}); save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise RowError(f"is not valid JSON ({error.msg} at {place}); correct or remove it.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RowError(f"is JSON that cannot be read ({error}); correct or remove it.") from error
    if not isinstance(row, dict):
        raise RowError(f"is {kind_of(row)}, not an object with named fields; correct or remove it.")
    return row


def kind_of(value: Any) -> str:
    """Returns what a JSON value is, for messages.

    >>> kind_of([1])
    'a list'
    """
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def open_rows(paths: Sequence[str], what: str) -> Rows:
    """Opens JSON Lines files and JSON arrays, plain or .gz, as one sequence of rows.

    Args:
        paths: files or globs, in this order; the matches of a glob are sorted by name.
        what: the key that named them, such as "data.train", for messages.

    Raises UserError naming the file and the remedy where one is missing, empty, unreadable or not such a file. A row
    that is malformed raises RowError when it is read, so that a policy can leave it out.
    """
    names = _expand(paths, what)
    digest = hashlib.sha256()
    places, indices, temporary = [], [], []
    try:
        for name in names:
            path, suffix = os.path.expanduser(name), name.lower()
            try:
                if suffix.endswith(".gz"):
                    path, suffix = unpack(path, f"{what}: {name}"), suffix.removesuffix(".gz")
                    temporary.append(path)
                index, content = index_file(path, f"{what}: {name}", os.path.splitext(suffix)[1])
            except OSError as error:
                raise UserError(
                    f"{what}: {name}: cannot be read ({error.strerror}); check the file and its permissions."
                ) from error
            if not len(index.starts):
                state = "holds no rows" if os.path.getsize(path) else "is empty"
                raise UserError(f"{what}: {name}: {state}; leave it out, or write it again.")
            places.append(path)
            indices.append(index)
            digest.update(f"{content}\n".encode())
    except BaseException:
        _remove(temporary)
        raise
    rows = Rows(names, places, indices, digest.hexdigest())
    weakref.finalize(rows, _remove, temporary)
    return rows


def _remove(paths: Sequence[str]) -> None:
    for path in paths:
        if os.path.exists(path):
            os.unlink(path)


def _expand(paths: Sequence[str], what: str) -> list[str]:
    """Returns the files that `paths` name. Raises UserError where one names none."""
    names: list[str] = []
    for path in paths:
        full = os.path.expanduser(path)
        if os.path.isdir(full):
            raise UserError(
                f"{what}: {path}: is a directory; name a file or a glob such as {os.path.join(path, '*.jsonl')}."
            )
        if os.path.lexists(full):
            found = [path]
        elif glob.has_magic(full):
            found = sorted(name for name in glob.glob(full, recursive=True) if not os.path.isdir(name))
            if not found:
                raise UserError(f"{what}: {path}: matches no file; check the path and the pattern.")
        else:
            raise UserError(f"{what}: {path}: there is no such file; check the path.")
        names += found
    if not names:
        raise UserError(f"{what}: names no file; give a file or a glob of rows.")
    seen: dict[str, str] = {}
    for name in names:
        suffix = os.path.splitext(name.lower().removesuffix(".gz"))[1]
        if suffix not in SUFFIXES:
            kinds = ", ".join(SUFFIXES)
            raise UserError(f"{what}: {name}: is no kind of file that is read here; use {kinds}, also with .gz.")
        real = os.path.realpath(os.path.expanduser(name))
        if real in seen:
            raise UserError(f"{what}: {name}: is the same file as {seen[real]}; name it once.")
        seen[real] = name
    return names
