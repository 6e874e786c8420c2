"""Checkpoints: flat dicts path -> array with a manifest, saved by Orbax in the background, verified when restored.

A checkpoint is one folder `STEP`. Orbax writes the arrays into it; when all of them are on disk, `manifest.json` is
written last and is the commit: it holds the shape, dtype and checksum of every array, a digest of every file, and a
digest of itself. A folder without a manifest does not exist, and only after the commit are older checkpoints removed.
(Orbax alone restores flipped bits and takes an empty folder for the newest step [measured with 0.12], so neither is
left to it. The file digests find damage before anything is read; the array checksums are made on the devices and so
also cover the way from the disk into the shards.)
"""

import concurrent.futures
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sft_jax.errors import UserError
from sft_jax.checkpoint.disk import explained
from sft_jax.checkpoint.integrity import checksums

FORMAT = 1
_MANIFEST = "manifest.json"
_ARRAYS = "arrays"


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be used; the message says what of it is wrong."""


def flatten_state(state) -> dict[str, Any]:
    """Returns the leaves of a pytree by path, such as "params/final_norm/scale"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    flat = {_path_name(path): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves of the state share a path"
    return flat


def unflatten_state(like, flat: dict[str, Any]):
    """Returns a pytree of the structure of `like` with the leaves of `flat`."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(treedef, [flat[_path_name(path)] for path, _ in leaves])


def _path_name(path) -> str:
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name in ("value", "raw_value"):
        path = path[:-1]  # the inside of an nnx.Variable
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


class Checkpoints:
    """The checkpoints of one run. All processes of the run make the same calls."""

    def __init__(self, folder: str | Path, keep: int):
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._committer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: concurrent.futures.Future | None = None
        self.removed: list[str] = []  # folders of saves that a kill cut short, found and removed at this start
        with explained(self._folder, "checkpoints"):
            self._folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self.removed = _remove_uncommitted(self._folder)

    def save(self, step: int, state: dict[str, jax.Array], manifest: dict[str, Any]) -> None:
        """Starts to save and returns as soon as the state may change. A step that is committed is not saved again.

        Raises what the save before this one met in the background; there is never more than one under way.
        """
        self.wait()
        if step in self.steps():
            return
        sums = checksums(state)
        arrays = {name: [list(x.shape), str(x.dtype), sums[name]] for name, x in state.items()}
        body = {"format": FORMAT, "step": step, "arrays": arrays, **manifest}
        place = self._folder / str(step)
        with explained(self._folder, "the checkpoint"):
            self._writer.save(place / _ARRAYS, args=ocp.args.PyTreeSave(state), force=True)
        self._pending = self._committer.submit(self._commit, place, body)

    def _commit(self, place: Path, body: dict[str, Any]) -> None:
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        body["files"] = {str(path.relative_to(place)): _file_digest(path) for path in _files(place)}
        _write_manifest(place / _MANIFEST, body)
        for step in committed_steps(self._folder)[: -self._keep]:
            shutil.rmtree(self._folder / str(step))

    def wait(self) -> None:
        """Waits for the save in the background and raises what it met."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with explained(self._folder, "the checkpoint"):
                pending.result()

    def check(self) -> None:
        """Raises what a finished save in the background met; returns at once if it is still under way."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._committer.shutdown()
            self._writer.close()

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first."""
        return committed_steps(self._folder)

    def folder(self, step: int) -> Path:
        return self._folder / str(step)

    def set_aside(self, step: int) -> Path:
        """Renames a damaged step, so that it is neither found again nor lost, and returns its new place."""
        place = next(
            place
            for count in range(1, 1000)
            if not (place := self._folder / f"{step}.damaged{count if count > 1 else ''}").exists()
        )
        _sync("set aside")
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(place)
        _sync("was set aside")
        return place


def committed_steps(folder: Path) -> list[int]:
    """Returns the steps in `folder` that have a manifest, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and (entry / _MANIFEST).is_file())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of the checkpoint in `folder`. Raises DamagedCheckpoint if it is not what was written."""
    path = folder / _MANIFEST
    try:
        digest, _, text = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise DamagedCheckpoint(f"{path} is not what was written: its digest differs")
    body = json.loads(text)
    if body["format"] != FORMAT:
        raise UserError(
            f"{folder}: has checkpoint format {body['format']}, and this version reads {FORMAT}. Use the version that wrote it."
        )
    return body


def verify(folder: Path) -> dict[str, Any]:
    """Returns the manifest of the checkpoint in `folder` after every file has been compared with its digest.

    Raises DamagedCheckpoint, in all processes together, where a file is missing, cut, changed or new.
    """
    try:
        manifest = read_manifest(folder)
        problem = _damaged_file(folder, manifest["files"])
    except DamagedCheckpoint as error:
        problem = str(error)
    _agree(problem)
    return manifest


def restore(folder: Path, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns the arrays of a verified checkpoint that `like` names, in its shardings.

    Args:
        folder: A step that `verify` found sound.
        like: Shape, dtype and sharding by path; all arrays of the checkpoint, or some of them.

    Raises:
        UserError: the checkpoint is of another model or optimizer.
        DamagedCheckpoint: what arrived on the devices is not what was saved.
    """
    written = read_manifest(folder)["arrays"]
    _check_same_state(written, like, folder)
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.PyTreeCheckpointer() as reader:
        arrays = reader.restore(
            folder / _ARRAYS,
            args=ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True),
        )
    found = checksums(arrays)
    wrong = [name for name in like if found[name] != written[name][2]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DamagedCheckpoint(f"{folder}: the checksum differs for {', '.join(wrong[:3])}{more}")
    return arrays


def _damaged_file(folder: Path, digests: dict[str, str]) -> str | None:
    """Returns what is wrong with this process's share of the files, or None."""
    present = {str(path.relative_to(folder)) for path in _files(folder)} - {_MANIFEST}
    for name in sorted(present - digests.keys()):
        return f"{folder / name} was not there when the checkpoint was written"
    mine = sorted(digests)[jax.process_index() :: jax.process_count()]
    for name in mine:
        if name not in present:
            return f"{folder / name} is missing"
        if _file_digest(folder / name) != digests[name]:
            return f"{folder / name} is not what was written: its digest differs"
    return None


def _agree(problem: str | None) -> None:
    """Raises DamagedCheckpoint in every process if any of them met a problem."""
    if jax.process_count() > 1:
        met = np.asarray(multihost_utils.process_allgather(np.int32(problem is not None))).ravel()
        if problem is None and met.any():
            problem = f"process {int(met.argmax())} found a damaged file; its output names it"
    if problem is not None:
        raise DamagedCheckpoint(problem)


def _check_same_state(written: dict[str, Any], like: dict[str, jax.ShapeDtypeStruct], folder: Path) -> None:
    missing = sorted(like.keys() - written.keys())
    changed = [name for name, x in like.items() if name in written and written[name][:2] != [list(x.shape), str(x.dtype)]]
    parts = [
        f"{label}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for label, names in (("not in it", missing), ("of another shape or dtype", changed))
        if names
    ]
    if parts:
        raise UserError(
            f"{folder}: is a checkpoint of another model or optimizer ({'; '.join(parts)}). "
            "Continue with the configuration of that run, or use another --workdir."
        )


def _write_manifest(path: Path, body: dict[str, Any]) -> None:
    text = json.dumps(body, sort_keys=True).encode()
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_uncommitted(folder: Path) -> list[str]:
    """Removes and returns what a killed process left behind: folders of steps that were never committed."""
    committed = {str(step) for step in committed_steps(folder)}
    left = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name not in committed]
    left = [entry for entry in left if ".damaged" not in entry.name]
    for entry in left:
        shutil.rmtree(entry)
    return [entry.name for entry in left]


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
