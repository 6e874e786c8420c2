"""Writing a store: in a folder of its own beside the final one, which is renamed when it is complete.

So a killed or failed build leaves nothing behind that could be taken for a store, and two processes that build the same
store do not meet.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.store import FIELDS, FORMAT, Encoded, manifest_hash
from sft_jax.errors import UserError

SHARD_TOKENS = 1 << 26  # a shard is closed once it holds so many tokens
_LOCK = "lock"  # file in a folder that is being written


class StoreWriter:
    """Writes a store of `folder`. Use as a context manager; an exception removes what was written so far."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS):
        self.folder = folder
        self.temporary = folder  # known once it is made
        self._lock: Any = None  # held as long as the temporary folder is written to
        self.id_dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
        self.vocab_size = vocab_size
        self.shard_tokens = shard_tokens
        self.shards: list[dict[str, Any]] = []
        self._open: dict[str, _HashedFile] = {}
        self._tokens = self._examples = 0

    def __enter__(self) -> "StoreWriter":
        with disk_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.folder)
            self.temporary, self._lock = _locked_folder(self.folder)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for file in self._open.values():
            file.abandon()
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._lock.close()

    def append(self, part: Encoded, files: np.ndarray, lines: np.ndarray) -> None:
        """Appends examples. `files` and `lines` say where their rows are, int [examples]."""
        _check_encoded(part, self.vocab_size)
        fields = {**part._asdict(), "files": files, "lines": lines}
        with disk_errors(self.folder):
            if not self._open:
                base = self.temporary / f"{len(self.shards):05d}"
                self._open = {name: _HashedFile(base.with_suffix(f".{name}")) for name in FIELDS}
            for name, kind in FIELDS.items():
                kind = self.id_dtype if name == "ids" else kind
                self._open[name].write(np.ascontiguousarray(fields[name], kind).tobytes())
            self._tokens += len(part.ids)
            self._examples += len(part.lengths)
            if self._tokens >= self.shard_tokens:
                self._close_shard()

    def finish(
        self, file_names: list[str], meta: dict[str, Any], bad_rows: list[dict[str, Any]], folder: Path | None = None
    ) -> None:
        """Writes the manifest and moves the store into place. Another process that was faster wins.

        Args:
            folder: where the store belongs, if what was written decides that; a folder beside the one named at first.
        """
        folder = folder or self.folder
        with disk_errors(self.folder):
            if self._open:
                self._close_shard()
            bad = _HashedFile(self.temporary / "bad_rows.jsonl")
            bad.write("".join(json.dumps(row) + "\n" for row in bad_rows).encode())
            manifest = {
                "format": FORMAT, "id_dtype": self.id_dtype, "files": file_names, "meta": meta,
                "shards": self.shards, "bad_rows": bad.close(),
            }  # fmt: skip
            manifest["hash"] = manifest_hash(manifest)
            file = _HashedFile(self.temporary / "manifest.json")
            file.write(json.dumps(manifest, indent=1).encode())
            file.close()
            _move(self.temporary, folder)
            _sync_folder(folder.parent)

    def _close_shard(self) -> None:
        files = {name: file.close() for name, file in self._open.items()}
        self.shards.append({"tokens": self._tokens, "examples": self._examples, "files": files})
        self._open, self._tokens, self._examples = {}, 0, 0


def _move(temporary: Path, folder: Path) -> None:
    """Renames a complete store, unless there is one already; what is left of an unfinished one makes room."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if (folder / "manifest.json").exists():
            return
        if not folder.is_dir():
            raise
        shutil.rmtree(folder)  # a removal or a copy that was cut short
        os.rename(temporary, folder)
    (folder / _LOCK).unlink(missing_ok=True)


def remove_store(folder: Path) -> None:
    """Removes a store; the manifest goes first, so that what is left of an interrupted removal is no store."""
    with disk_errors(folder):
        (folder / "manifest.json").unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)


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
    lock is held.
    """
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
    """Removes unfinished builds of the same store that nobody works on any more."""
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
