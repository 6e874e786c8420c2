"""Rows from files: any row by its number, and the file and line that it came from."""

import glob
import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sft_jax.data.examples import RowError
from sft_jax.data.json_files import Index, Piece, index_file, unpack
from sft_jax.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json")
OPEN_FILES = 32  # that one Rows keeps open
DEEPEST = 100  # lists and objects in each other


class Where(NamedTuple):
    """Where a row is from; `str` of it is "file:line", the beginning of every message about the row."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class File(NamedTuple):
    """A file of rows."""

    name: str  # as the user knows it
    path: str
    packed: bool  # a .gz file
    size: int  # bytes, unpacked
    index: Index


class Rows(Sequence):
    """The rows of several files in a row, read when they are asked for. Made by `open_rows`.

    However many files there are, few are open at a time. One thread of one process reads; workers are sent rows.
    """

    def __init__(self, files: Sequence[File], fingerprint: str, unpacked: "_Unpacked"):
        self.names = tuple(file.name for file in files)
        self.fingerprint = fingerprint
        self._files = tuple(files)
        self._bases = np.concatenate([[0], np.cumsum([len(file.index.starts) for file in files])])
        self._unpacked = unpacked
        self._open: dict[int, int] = {}  # number of a file -> descriptor, the one used last at the end
        weakref.finalize(self, _close, self._open)

    def __len__(self) -> int:
        return int(self._bases[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns row `row`. Raises RowError where it is not a JSON object in UTF-8, and IndexError beyond the end."""
        (found,) = self.read(row, row + 1)
        if isinstance(found, RowError):
            raise found
        return found

    def read(self, first: int, stop: int) -> list[dict[str, Any] | RowError]:
        """Returns the rows [first, stop), each file read once; for one that cannot be used, the error that says why."""
        result: list[dict[str, Any] | RowError] = []
        while first < stop:
            number, local = self._find(first)
            index = self._files[number].index
            starts, ends = index.starts[local : local + stop - first], index.ends[local : local + stop - first]
            begin, end = int(starts[0]), int(ends[-1])
            data = self._piece(number).read(begin, end - begin)
            if len(data) != end - begin:
                raise self._changed(number)
            for start, end in zip((starts - begin).tolist(), (ends - begin).tolist(), strict=True):
                try:
                    result.append(parse_row(data[start:end]))
                except RowError as error:
                    result.append(error)
            first += len(starts)
        return result

    def where(self, row: int) -> Where:
        """Returns the file and the line on which row `row` begins."""
        number, local = self._find(row)
        return Where(self.names[number], int(self._files[number].index.lines[local]))

    def _find(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self._bases, row, side="right")) - 1
        return number, row - int(self._bases[number])

    def _piece(self, number: int) -> Piece:
        """Returns the bytes of a file, which it opens and checks if it is not open."""
        file = self._files[number]
        try:
            if file.packed:
                piece = self._unpacked.piece(file.path, file.name)
            else:
                descriptor = self._open.pop(number, None)
                if descriptor is None:
                    if len(self._open) >= OPEN_FILES:
                        os.close(self._open.pop(next(iter(self._open))))
                    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                self._open[number] = descriptor
                piece = Piece(descriptor, 0, os.fstat(descriptor).st_size)
        except OSError as error:
            raise UserError(f"{file.name}: can no longer be read ({error}); start again.") from error
        if piece.size != file.size:
            if not file.packed:
                os.close(self._open.pop(number))
            raise self._changed(number)
        return piece

    def _changed(self, number: int) -> UserError:
        return UserError(f"{self.names[number]}: has changed since it was first read; start again.")


class _Unpacked:
    """What .gz files hold, in one file without a name: it vanishes with the process, however that ends."""

    def __init__(self):
        self._file: BinaryIO | None = None
        self._pieces: dict[str, Piece] = {}  # by path

    def piece(self, path: str, name: str) -> Piece:
        """Returns the content of a .gz file, unpacking it where that has not been done."""
        if path not in self._pieces:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="sft_jax-")
                weakref.finalize(self, self._file.close)
            self._pieces[path] = unpack(path, name, self._file)
        return self._pieces[path]


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def parse_row(data: bytes) -> dict[str, Any]:
    """Returns the JSON object in `data`. Raises RowError saying what else it is."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"is not UTF-8 (byte {error.start + 1} of the row is 0x{data[error.start]:02x}); save it as UTF-8."
        ) from error
    row = parse_json(text)
    if not isinstance(row, dict):
        raise RowError(f"is {kind_of(row)}, not an object with named fields; correct or remove it.")
    return row


def parse_json(text: str) -> Any:
    """Returns the JSON value in `text`. Raises RowError saying what is wrong with it."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise RowError(f"is not valid JSON ({error.msg} at {place}); correct or remove it.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RowError(f"is JSON that cannot be read ({error}); correct or remove it.") from error
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):  # worker processes could not be sent it
        raise RowError(f"has lists and objects in more than {DEEPEST} others; correct or remove it.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. A key that comes twice is refused: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(f"has the key {twice!r} twice in one object; keep one of them.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # made once: json.loads would make one for every row


def _is_deep(value: Any) -> bool:
    layer = [value]
    for _ in range(DEEPEST + 1):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return bool(layer)


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
    digest = hashlib.sha256()
    files, unpacked = [], _Unpacked()
    for name in _expand(paths, what):
        path, suffix, packed = os.path.expanduser(name), name.lower(), name.lower().endswith(".gz")
        label, suffix = f"{what}: {name}", os.path.splitext(suffix.removesuffix(".gz"))[1]
        try:
            if packed:
                piece = unpacked.piece(path, label)
                index, content = index_file(piece, label, suffix)
            else:
                with open(path, "rb") as file:
                    piece = Piece(file.fileno(), 0, os.fstat(file.fileno()).st_size)
                    index, content = index_file(piece, label, suffix)
        except OSError as error:
            raise UserError(f"{label}: cannot be read ({error.strerror}); check the file and its permissions.") from error
        if not len(index.starts):
            raise UserError(f"{label}: {'holds no rows' if piece.size else 'is empty'}; leave it out, or write it again.")
        files.append(File(name, path, packed, piece.size, index))
        digest.update(f"{content}\n".encode())
    return Rows(files, digest.hexdigest(), unpacked)


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
