"""The folder of a run: its lock, its JSON files, and logs that are cut back to the checkpoint on resume."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.checkpoint.disk import explained


class Workdir:
    """The folder of a run. Locked while the object lives, so that two runs cannot write into one folder.

    The lock is the kernel's (flock): it goes with the process, also with one that was killed.
    """

    def __init__(self, path: str | Path, lock: bool = True):
        self.path = Path(path).absolute()
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

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a JSON file as a whole: a reader sees the old one or the new one."""
        place = self.path / name
        with explained(place, "the file"):
            temporary = place.with_name(place.name + ".tmp")
            temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            temporary.rename(place)

    def read_json(self, name: str) -> Any | None:
        """Returns the content of a JSON file, or None if there is none."""
        place = self.path / name
        if not place.is_file():
            return None
        try:
            return json.loads(place.read_text())
        except ValueError as error:
            raise UserError(f"{place}: is not JSON ({error}). Restore it, or use another --workdir.") from error

    def append_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        """Appends one JSON object a line."""
        with explained(self.path / name, "the log"), open(self.path / name, "a") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def cut_back(self, name: str, last_step: int) -> int:
        """Removes the records of steps after `last_step` from a log of `append_lines`; returns how many went.

        A line that a kill left unfinished goes too.
        """
        place = self.path / name
        if not place.is_file():
            return 0
        lines = place.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= last_step]
        if len(kept) < len(lines):
            temporary = place.with_name(place.name + ".tmp")
            with explained(place, "the log"):
                temporary.write_text("".join(kept))
                temporary.rename(place)
        return len(lines) - len(kept)


def _step_of(line: str) -> int | None:
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
