"""Files as bytes that are read anywhere: few are open at a time, and archives are unpacked into a file without a name."""

import gzip
import hashlib
import io
import os
import stat
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from sft_jax.errors import UserError, reason_of

BLOCK = 1 << 24  # bytes that are looked at in one go
OPEN_FILES = 32  # that one Pieces keeps open
PACKINGS = {".gz": "gzip", ".zst": "zstd"}  # suffix of an archive -> what it is


class Piece(NamedTuple):
    """`size` bytes of an open file from `start` on: a file, or one of several that were unpacked into one."""

    descriptor: int
    start: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """Returns the bytes [offset, offset + count), fewer where the piece or the file ends before that."""
        parts, end = [], min(offset + count, self.size)
        while offset < end:
            part = os.pread(self.descriptor, end - offset, self.start + offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def sha256(self) -> str:
        """Returns the SHA-256 of the bytes."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, BLOCK):
            digest.update(self.read(offset, BLOCK))
        return digest.hexdigest()

    def lines(self, offset: int = 0) -> Iterator[bytes]:
        """Yields the lines from byte `offset` on, each with its line feed."""
        return iter(io.BufferedReader(_Reader(self, offset), 1 << 20))


class _Reader(io.RawIOBase):
    """A piece as a file that is read from front to end."""

    def __init__(self, piece: Piece, offset: int):
        self._piece, self._offset = piece, offset

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._piece.read(self._offset, len(buffer))
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)


class State(NamedTuple):
    """By what a file that has been written again is known."""

    size: int  # bytes
    changed_at: int  # nanoseconds


def state_of(file: str | int) -> State:
    """Returns the state of a file, by its path or its descriptor."""
    found = os.stat(file)
    return State(found.st_size, found.st_mtime_ns)


class Pieces:
    """Files that are opened when they are read, of which few are open at a time.

    What .gz and .zst files hold is unpacked once, into one file without a name: it vanishes with the process, however
    that ends.
    """

    def __init__(self):
        self._open: dict[str, int] = {}  # path -> descriptor, the one used last at the end
        self._states: dict[str, State] = {}  # path -> that when it was first opened
        self._unpacked: dict[str, Piece] = {}  # by path
        self._scratch: BinaryIO | None = None
        weakref.finalize(self, _close, self._open)

    def open(self, path: str, label: str) -> Piece:
        """Returns the content of a file. Raises OSError, and UserError calling the file `label` for a damaged archive."""
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe has no end that could be waited for, and no rows by number
            raise UserError(f"{label}: is no regular file; save what it gives to one.")
        if packing(path):
            return self._unpack(path, label)
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = descriptor
        self._states.setdefault(path, state_of(descriptor))
        return Piece(descriptor, 0, os.fstat(descriptor).st_size)

    def reopen(self, path: str, name: str, size: int) -> Piece:
        """Returns the content of a file that was opened before, of `size` bytes. Raises UserError where it has changed since."""
        try:
            piece = self.open(path, name)
        except OSError as error:
            raise no_longer_read(name, error) from error
        if piece.size != size or not packing(path) and state_of(self._open[path]) != self._states[path]:
            os.close(self._open.pop(path))
            raise changed(name)
        return piece

    def _unpack(self, path: str, label: str) -> Piece:
        if path not in self._unpacked:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryFile(prefix="sft_jax-")
                weakref.finalize(self, self._scratch.close)
            self._unpacked[path] = unpack(path, label, self._scratch)
        return self._unpacked[path]


def packing(path: str) -> str:
    """Returns the suffix with which a file says that it is packed, or "".

    >>> packing("rows.jsonl.GZ")
    '.gz'
    """
    suffix = os.path.splitext(path)[1].lower()
    return suffix if suffix in PACKINGS else ""


def unpack(path: str, label: str, target: BinaryIO) -> Piece:
    """Decompresses the .gz or .zst file `path` to the end of `target`. Raises UserError calling the file `label`.

    Such a stream cannot be entered in the middle, and rows are read in any order; memory would be needed for all of it.
    Several archives in one file are one after the other what they hold.
    """
    start = target.seek(0, os.SEEK_END)
    kind = PACKINGS[packing(path)]
    buffer = memoryview(bytearray(BLOCK))  # pyarrow's `read` keeps what it was to fill where the archive is damaged
    with open(path, "rb") as file:  # an OSError from here on is the archive's, which is how pyarrow tells of damage
        try:
            # zstd is pyarrow's, which has it anyway; it takes windows of up to 128 MB and no larger ones.
            with gzip.open(file) if kind == "gzip" else pa.CompressedInputStream(pa.PythonFile(file, "r"), kind) as source:
                while count := source.readinto(buffer):
                    _write(target, buffer[:count])
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise UserError(f"{label}: is not a whole {kind} file ({error}); copy it again.") from error
    return Piece(target.fileno(), start, target.tell() - start)


def _write(file: BinaryIO, block: memoryview) -> None:
    try:
        file.write(block)
        file.flush()
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()}: cannot hold an unpacked data file ({error.strerror}); free space there, point "
            "TMPDIR elsewhere, or unpack the file yourself."
        ) from error


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def no_longer_read(name: str, error: OSError) -> UserError:
    """Returns what to say of a file that was read before and cannot be opened now."""
    return UserError(f"{name}: can no longer be read ({error}); start again.")


def changed(name: str) -> UserError:
    """Returns what to say of a file that is not the one whose rows were counted."""
    return UserError(f"{name}: has changed since it was first read; start again.")


def file_sha256(path: str) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(name: str, error: Exception) -> UserError:
    """Returns what to say of a file in which a block of rows cannot be read."""
    return UserError(f"{name}: is damaged ({reason_of(error)}); copy it again.")
