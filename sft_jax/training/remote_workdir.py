"""The folder of a run in an object store: a folder on this disk whose files are copied there whenever state is saved.

A store cannot append to a log and has no lock. So the run works in a folder of the cache, as on any disk; what it holds goes to
the store before each checkpoint and at the end, and comes back at the next start, on whatever machine. Checkpoints go there
directly, each process its part. A log that is older than the checkpoint would be incomplete and a newer one is cut back, so logs
go first.

In place of a lock each start writes its name into the folder and looks whether it still stands there before it copies: the last
start wins, since the one before may be on a machine that is gone, and one that still runs ends before it saves again.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
from pathlib import Path

from sft_jax.checkpoint.storage import download, is_remote, reachable, remove_tree, storage_place, upload
from sft_jax.data.cache import default_cache
from sft_jax.errors import UserError
from sft_jax.training.workdir import Workdir

_OWNER = "owner.json"
_NOT_FETCHED = ("checkpoints", "export", "adapter", "profile", "stacks", _OWNER)
_NOT_PUBLISHED = (".lock",)


class RemoteWorkdir(Workdir):
    """The folder of a run at a URL; `path` is the folder on this disk, of this process alone."""

    def __init__(self, url: str, index: int):
        self._url = storage_place(url)
        name = hashlib.sha256(str(self._url).encode()).hexdigest()[:16]
        local = default_cache() / "workdirs" / name / f"process_{index}"
        super().__init__(local)
        self._published: dict[str, tuple[int, int]] = {}  # name -> size and time of what lies in the store
        self._me = json.dumps({"start": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()})
        with reachable(self._url):
            self._fetch()
            if index == 0:
                (self._url / _OWNER).write_text(self._me)

    def _fetch(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in _NOT_PUBLISHED:
                entry.unlink()
        download(self._url, self.path, _NOT_FETCHED)
        self._published = self._states()

    def _states(self) -> dict[str, tuple[int, int]]:
        """Returns size and time of the files of this folder that are to lie in the store, by name."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in _NOT_PUBLISHED and not name.endswith(".tmp"):
                found[name] = (path.stat().st_size, path.stat().st_mtime_ns)
        return found

    @property
    def shown(self) -> str:
        return str(self._url)

    @property
    def checkpoints(self):
        return self._url / "checkpoints"

    def remove(self, name: str) -> None:
        super().remove(name)
        self._published.pop(name, None)
        with reachable(self._url), contextlib.suppress(FileNotFoundError):
            (self._url / name).unlink()

    def publish(self) -> None:
        """Copies what has changed to the store. Raises UserError where another start has taken the run over."""
        with reachable(self._url):
            owner = (self._url / _OWNER).read_text()
            if owner != self._me:
                other = json.loads(owner)
                raise UserError(
                    f"{self.shown}: was taken over by process {other['pid']} on {other['host']}, which was started later. "
                    "Only the last start of a run goes on; use another --workdir for another run."
                )
            for name, state in self._states().items():
                if self._published.get(name) != state:
                    upload(self.path / name, self._url / name)
                    self._published[name] = state

    def share(self, name: str) -> None:
        """Copies one file to the store now, whoever owns the run."""
        with reachable(self._url):
            upload(self.path / name, self._url / name)

    def replace_folder(self, name: str) -> None:
        """Removes an export of before from the store, of which a file could otherwise stay among those of the next one."""
        with reachable(self._url), contextlib.suppress(FileNotFoundError):
            remove_tree(self._url / name)


def open_workdir(path: str | Path, index: int) -> Workdir:
    """Returns the folder of a run, on a disk or in a store; `index` is that of this process, the first of which locks it."""
    return RemoteWorkdir(str(path), index) if is_remote(path) else Workdir(path, lock=index == 0)
