"""Writing a store: shard by shard, each in a folder of its own that is renamed when it is complete, and the manifest last.

So a build that is killed or fails leaves whole shards, which the next one goes on from, and nothing that could be taken
for one. Processes that make the same shard do not meet: the faster one wins, and the bytes are the same. A shard depends
on its rows alone, so several hosts can write shards of one store into a folder that they share.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.stores.store import (
    BAD_ROWS,
    FIELDS,
    FORMAT,
    SHARD_RECORD,
    Encoded,
    Shard,
    StoreDamaged,
    manifest_path,
    open_shard,
    record_hash,
    shard_path,
)
from sft_jax.errors import UserError

_LOCK = "lock"  # file in a folder that is being written

_TRIES = 8  # to make a folder that processes which fail take away

class ShardWriter:
    """Writes shard `number` of the store in `folder`, of the rows [first, stop). Use as a context manager.

    Unless it was finished, nothing of it is left.
    """

    def __init__(self, folder: Path, number: int, rows: tuple[int, int], vocab_size: int):
        self.folder, self.number, self.rows = folder, number, rows
        self.vocab_size = vocab_size
        self.id_dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
        self.temporary = folder  # known once it is made
        self._lock: Any = None  # held as long as the temporary folder is written to
        self._files: dict[str, _HashedFile] = {}
        self._tokens = self._examples = 0

    def __enter__(self) -> "ShardWriter":
        with disk_errors(self.folder):
            self.temporary, self._lock = self._make()
            self._files = {name: _HashedFile(self.temporary / name) for name in FIELDS}
        return self

    def _make(self) -> tuple[Path, Any]:
        for _ in range(_TRIES):
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process that has failed took the empty folder away
                return _locked_folder(shard_path(self.folder, self.number))
        return _locked_folder(shard_path(self.folder, self.number))

    def __exit__(self, kind, error, trace) -> None:
        for file in self._files.values():
            file.abandon()
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._lock.close()
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # where it is empty

    def append(self, part: Encoded, files: np.ndarray, lines: np.ndarray) -> None:
        """Appends examples. `files` and `lines` say where their rows are, int [examples]."""
        _check_encoded(part, self.vocab_size)
        fields = {**part._asdict(), "files": files, "lines": lines}
        with disk_errors(self.folder):
            for name, kind in FIELDS.items():
                kind = self.id_dtype if name == "ids" else kind
                self._files[name].write(np.ascontiguousarray(fields[name], kind).tobytes())
        self._tokens += len(part.ids)
        self._examples += len(part.lengths)

    def finish(self, counted: dict[str, Any], bad_rows: Sequence[dict[str, Any]], suffix: str = "") -> Shard:
        """Writes the record and moves the shard into place. Another process that was faster wins.

        Args:
            counted: goes into the record.
            suffix: of the name of the shard, which what was written decides.
        """
        folder = shard_path(self.folder, self.number, suffix)
        with disk_errors(self.folder):
            bad = _HashedFile(self.temporary / BAD_ROWS)
            bad.write("".join(json.dumps(row) + "\n" for row in bad_rows).encode())
            files = {name: file.close() for name, file in (*self._files.items(), (BAD_ROWS, bad))}
            record = {
                "format": FORMAT, "rows": list(self.rows), "id_dtype": self.id_dtype, "tokens": self._tokens,
                "examples": self._examples, "counted": counted, "files": files,
            }  # fmt: skip
            _write_record(self.temporary / SHARD_RECORD, record)
            _move(self.temporary, folder)
            _sync_folder(self.folder)
        return Shard(folder, json.loads((folder / SHARD_RECORD).read_text()))


def find_shard(
    folder: Path, number: int, suffixes: Sequence[str], rows: tuple[int, int], log: Callable[[str], None]
) -> Shard | None:
    """Returns shard `number` of the store in `folder` where a build before has finished it; `suffixes` as its name may end.

    A damaged one is named and removed.
    """
    for suffix in suffixes:
        place = shard_path(folder, number, suffix)
        try:
            shard = open_shard(place)
            if shard is not None and shard.record["rows"] != list(rows):
                raise StoreDamaged(f"{place / SHARD_RECORD} is not of the rows {rows[0]} to {rows[1]}")
        except StoreDamaged as error:
            log(f"A part of the prepared data is damaged and is made again: {error}.")
            remove_shard(place)
            continue
        if shard is not None:
            return shard
    return None


def write_manifest(folder: Path, suffix: str, shards: Sequence[Shard], files: Sequence[str], meta: dict[str, Any]) -> None:
    """Makes `shards` the store of a suffix; `files` are the names of what its examples were read from."""
    entries = [{"folder": shard.folder.name, "hash": shard.record["hash"]} for shard in shards]
    path = manifest_path(folder, suffix)
    with disk_errors(folder):
        temporary, lock = _locked_folder(path)
        try:
            _write_record(temporary / path.name, {"format": FORMAT, "files": list(files), "meta": meta, "shards": entries})
            os.replace(temporary / path.name, path)
            _sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.close()


def remove_manifest(folder: Path, suffix: str = "") -> None:
    """Makes a store none; its shards stay, and those that are whole are used again."""
    with disk_errors(folder):
        manifest_path(folder, suffix).unlink(missing_ok=True)


def remove_shard(place: Path) -> None:
    """Removes a shard; its record goes first, so that what is left of an interrupted removal is no shard."""
    with disk_errors(place):
        (place / SHARD_RECORD).unlink(missing_ok=True)
        if place.exists():
            shutil.rmtree(place)


def _move(temporary: Path, folder: Path) -> None:
    """Renames a complete shard, unless there is one already; what is left of a removed one makes room."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if (folder / SHARD_RECORD).exists():
            return
        if not folder.is_dir():
            raise
        shutil.rmtree(folder)  # a removal or a copy that was cut short
        os.rename(temporary, folder)
    (folder / _LOCK).unlink(missing_ok=True)


def _write_record(path: Path, record: dict[str, Any]) -> None:
    file = _HashedFile(path)
    file.write(json.dumps({**record, "hash": record_hash(record)}, indent=1, sort_keys=True).encode())
    file.close()


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into a UserError that names the folder and the key."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: prepared data cannot be written: {error.strerror or error}; free some space there, "
            "or name another folder in data.cache_dir."
        ) from error


class _HashedFile:
    """A new file whose size and hash are known when it is closed, and which is on disk then."""

    def __init__(self, path: Path):
        self._file = open(path, "xb")
        self._hash = hashlib.blake2b(digest_size=16)
        self._bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "hash": self._hash.hexdigest()}

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a full disk fails again when buffers are flushed; the file goes anyway
            self._file.close()


def _check_encoded(part: Encoded, vocab_size: int) -> None:
    """Raises ValueError where the arrays do not fit together, before anything of them is written."""
    examples = len(part.lengths)
    for name in ("run_counts", "rows", "turns", "turn_counts"):
        if len(getattr(part, name)) != examples:
            raise ValueError(f"{name}: {len(getattr(part, name))} entries for {examples} examples")
    if part.lengths.sum() != len(part.ids) or part.run_lengths.sum() != len(part.ids):
        raise ValueError("lengths or run_lengths do not sum to the number of tokens")
    if part.run_counts.sum() != len(part.run_lengths) or part.turn_counts.sum() != len(part.turn_starts):
        raise ValueError("run_counts or turn_counts do not sum to the number of their entries")
    if not (np.isfinite(part.run_weights) & (part.run_weights >= 0)).all():
        raise ValueError("a weight is negative or not finite")
    if len(part.ids) and not (0 <= part.ids.min() and part.ids.max() < vocab_size):
        raise ValueError(f"token ids {part.ids.min()} to {part.ids.max()} lie outside the vocabulary of {vocab_size}")


def _locked_folder(folder: Path) -> tuple[Path, Any]:
    """Returns a new folder beside `folder` and the open file in it that is locked until the process ends.

    The lock, not the number of a process, says whether somebody still writes there: containers that share a disk have
    the same numbers and often the same name. The folder gets a name that `_remove_abandoned` looks for only when the
    lock is held. Removes what was abandoned on the way to the same `folder`; what is on the way to others may be that of
    another host, whose locks not every shared disk shows.
    """
    _remove_abandoned(folder)
    number = uuid.uuid4().hex
    hidden = folder.with_name(f".{folder.name}.{number}")
    hidden.mkdir()
    lock = open(hidden / _LOCK, "w")
    with contextlib.suppress(OSError):  # a file system without locks: what is abandoned there stays
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    temporary = folder.with_name(f"{folder.name}.tmp.{number}")
    os.rename(hidden, temporary)
    return temporary, lock


def _remove_abandoned(folder: Path) -> None:
    """Removes what was to become `folder` and nobody works on any more."""
    for entry in folder.parent.glob(f"{folder.name}.tmp.*"):
        with contextlib.suppress(OSError), open(entry / _LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
            shutil.rmtree(entry, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
