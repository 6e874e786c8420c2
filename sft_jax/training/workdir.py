"""The folder of a run: its lock, its JSON files, and logs that are cut back to the checkpoint on resume."""

import fcntl
import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_jax.checkpoint.disk import explained
from sft_jax.checkpoint.storage import Place, storage_place
from sft_jax.errors import UserError


class Workdir:
    """The folder of a run. Locked while the object lives, so that two runs cannot write into one folder.

    The lock is the kernel's (flock): it goes with the process, also with one that was killed.
    """

    def __init__(self, path: str | Path, lock: bool = True):
        self.path = storage_place(path)
        self._lock = None
        with explained(self.path, "the folder of the run"):
            self.path.mkdir(parents=True, exist_ok=True)
            if lock:
                self._lock = open(self.path / ".lock", "a+")
        if lock:
            self._take_lock()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise UserError(f"{self.path}: is in use by {holder}. Wait for it or stop it, or use another --workdir.") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def shown(self) -> str:
        """The folder as the user names it."""
        return str(self.path)

    @property
    def checkpoints(self) -> Place:
        """Where the checkpoints of the run lie."""
        return self.path / "checkpoints"

    def publish(self) -> None:
        """Makes what was written lasting, where that is not so at once; the first process calls it before each save."""

    def share(self, name: str) -> None:
        """Makes one file lasting at once; any process may call it, each for files of its own."""

    def replace_folder(self, name: str) -> None:
        """Removes what a store holds of a folder that is about to be published anew."""

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a JSON file as a whole: a reader sees the old one or the new one."""
        self._replace(name, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any | None:
        """Returns the content of a JSON file, or None if there is none."""
        place = self.path / name
        if not place.is_file():
            return None
        try:
            return json.loads(place.read_bytes())
        except ValueError as error:
            raise UserError(f"{place}: is not JSON ({error}). Restore it, or use another --workdir.") from error

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replaces a file as a whole, also one in a folder of the run's."""
        with explained(self.path / name, "the file"):
            (self.path / name).parent.mkdir(exist_ok=True)
        self._replace(name, content)

    def remove(self, name: str) -> None:
        with explained(self.path / name, "the file"):
            (self.path / name).unlink(missing_ok=True)

    def append_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        """Appends one JSON object a line."""
        lines = [json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
        with explained(self.path / name, "the log"), open(self.path / name, "a", encoding="utf-8") as file:
            file.writelines(lines)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the records of a log of `append_lines`, without a last line that a kill left unfinished."""
        return [record for line in self._lines(name) if (record := _record(line)) is not None]

    def cut_back(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Removes the records that `keep` refuses from a log of `append_lines`; returns how many lines went.

        A line that is no record, such as one that a kill left unfinished, goes too.
        """
        lines = self._lines(name)
        kept = [line for line in lines if (record := _record(line)) is not None and keep(record)]
        if len(kept) < len(lines):
            self._replace(name, b"".join(kept))
        return len(lines) - len(kept)

    def _lines(self, name: str) -> list[bytes]:
        """Returns the lines of a log. They end at a newline and nowhere else: texts may hold U+2028 or U+0085."""
        place = self.path / name
        if not place.is_file():
            return []
        with open(place, "rb") as file:
            return file.readlines()

    def _replace(self, name: str, content: str | bytes) -> None:
        place = self.path / name
        temporary = place.with_name(place.name + ".tmp")
        with explained(place, "the file"):
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
            temporary.rename(place)


def plain(value: Any) -> Any:
    """Returns `value` with null for every number that JSON does not have: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: bytes) -> dict[str, Any] | None:
    """Returns the record of a line, or None for what `append_lines` has not written."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
