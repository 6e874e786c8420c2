"""Checkpoints: flat dicts path -> array with a manifest, saved by Orbax in the background, verified when restored.

A checkpoint is one folder `STEP`. A file `STEP.unfinished` beside it says that it is being written (or removed). Orbax
writes the arrays; when all of them are on disk, `manifest.json` is written and is the commit: it holds the shape, dtype
and checksum of every array and a digest of every file. Only after that does the marker go, and only then are older
checkpoints removed. So a folder without a manifest but with a marker is what a kill left and is removed at the next
start; one without either has been damaged, and is named. Nothing else in the folder is ever touched.
(Orbax alone restores flipped bits and takes an empty folder for the newest step [measured with 0.12], so neither is
left to it. The file digests find damage before anything is read; the array checksums are made on the devices and so
also cover the way from the disk into the shards.)
"""

import concurrent.futures
from collections.abc import Collection
from functools import cached_property
from typing import Any

import jax

from sft_jax.checkpoint import manifest as manifest_lib
from sft_jax.checkpoint.disk import explained
from sft_jax.checkpoint.integrity import checksums
from sft_jax.checkpoint.manifest import MANIFEST, DamagedCheckpoint, committed_steps, damaged_file, read_manifest, step_folders
from sft_jax.checkpoint.processes import agree, processes_where
from sft_jax.checkpoint.storage import Place, remove_tree, rename_tree, storage_place
from sft_jax.errors import StoppedBySignal, UserError

_ARRAYS = "arrays"
_MARKER = ".unfinished"
_DAMAGED = ".damaged"


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
    """The checkpoints of one run. All processes of the run make the same calls.

    Use as a context manager: what a save in the background met is raised at the end, also beside another error.
    """

    def __init__(self, folder: str | Place, keep: int):
        """Opens the folder, and removes from it what a kill left."""
        self._folder = storage_place(folder)
        self._keep = keep
        self._pending: concurrent.futures.Future | None = None
        # The newest step that was saved or resumed from. Kept here, not read from the disk: one process may see a commit
        # that another does not see yet, and they would part ways.
        self.last: int | None = None
        self.removed: list[int] = []  # steps whose save a kill cut short, found and removed at this start
        agree(self._open)
        self._committer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="commit")

    @cached_property
    def _writer(self):
        """Orbax's, made when the first checkpoint is saved: importing it takes a tenth of a small run's start."""
        import orbax.checkpoint as ocp

        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def _open(self) -> None:
        with explained(self._folder, "checkpoints"):
            self._folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                self.removed = self._remove_unfinished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, KeyboardInterrupt):  # at once; a save that is cut short does not exist
            self._committer.shutdown(wait=False)
            return
        try:
            self.close()
        except Exception as met:
            if error is None or isinstance(error, StoppedBySignal):  # which says that the state is saved
                raise
            if isinstance(error, UserError) and isinstance(met, UserError):
                raise UserError(f"{error} And: {met}") from error
            error.add_note(f"Besides, the checkpoint that was being saved failed: {met}")

    def save(self, step: int, state: dict[str, jax.Array], manifest: dict[str, Any], protected: Collection[int] = ()) -> None:
        """Starts to save and returns as soon as the state may change. The step that was saved last is not saved again.

        Once it is there, older ones are removed, but for the newest `keep` and the `protected` ones. Raises what the save before this one met in the background; there is never more than one under way.
        """
        agree(self.wait)
        if step == self.last:
            return
        agree(lambda: self._mark(step))
        sums = checksums(state)
        arrays = {name: [list(x.shape), str(x.dtype), sums[name]] for name, x in state.items()}
        place = self._folder / str(step)
        import orbax.checkpoint as ocp

        with explained(self._folder, "the checkpoint"):
            self._writer.save(place / _ARRAYS, args=ocp.args.PyTreeSave(state), force=True)
        self._pending = self._committer.submit(self._commit, step, {"step": step, "arrays": arrays, **manifest}, protected)
        self.last = step

    def _commit(self, step: int, body: dict[str, Any], protected: Collection[int]) -> None:
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        manifest_lib.write_manifest(self._folder / str(step), body)
        self._marker(step).unlink()
        self.prune(protected)

    def prune(self, protected: Collection[int]) -> None:
        """Removes all checkpoints but the newest `keep` and the `protected` ones. In the first process, with no save under way."""
        for old in committed_steps(self._folder)[: -self._keep]:
            if old in protected:
                continue
            self._marker(old).touch()
            (self._folder / str(old) / MANIFEST).unlink()
            remove_tree(self._folder / str(old))
            self._marker(old).unlink()

    def _mark(self, step: int) -> None:
        if jax.process_index() == 0:
            with explained(self._folder, "the checkpoint"):
                self._marker(step).touch()

    def _marker(self, step: int) -> Place:
        return self._folder / f"{step}{_MARKER}"

    def _remove_unfinished(self) -> list[int]:
        """Removes what a killed process left behind, which its marker tells from everything else; returns the steps."""
        removed = []
        for marker in self._folder.glob(f"*{_MARKER}"):
            name = marker.name.removesuffix(_MARKER)
            if not name.isdecimal() or not marker.is_file():
                continue
            place = self._folder / name
            if place.is_dir() and not (place / MANIFEST).is_file():
                remove_tree(place)
                removed.append(int(name))
            marker.unlink()
        return sorted(removed)

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
            if "_writer" in vars(self):
                self._writer.close()

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, oldest first; one without a manifest is damaged."""
        return step_folders(self._folder)

    def aside(self) -> list[Place]:
        """Returns the damaged steps that `set_aside` has renamed."""
        return sorted(self._folder.glob(f"[0-9]*{_DAMAGED}*"))

    def folder(self, step: int) -> Place:
        return self._folder / str(step)

    def set_aside(self, step: int) -> Place:
        """Renames a damaged step, so that it is neither found again nor lost, and returns its new place.

        The first process renames.
        """
        place = next(
            place
            for count in range(1, 1000)
            if not (place := self._folder / f"{step}{_DAMAGED}{count if count > 1 else ''}").exists()
        )

        def rename() -> None:
            if jax.process_index() == 0:
                with explained(self._folder, "checkpoints"):
                    rename_tree(self._folder / str(step), place)

        agree(rename)
        return place


def verify(folder: Place) -> dict[str, Any]:
    """Returns the manifest of the checkpoint in `folder` after every file has been compared with its digest.

    Raises DamagedCheckpoint, in all processes together, where a file is missing, cut, changed or new.
    """
    try:
        manifest = read_manifest(folder)
        problem = damaged_file(folder, manifest["files"], jax.process_index(), jax.process_count())
    except DamagedCheckpoint as error:
        problem = str(error)
    _raise_everywhere(problem)
    return manifest


def restore(folder: Place, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
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
    import orbax.checkpoint as ocp

    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.PyTreeCheckpointer() as reader:
        arrays = reader.restore(
            storage_place(folder) / _ARRAYS,  # Orbax takes no relative one
            args=ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True),
        )
    found = checksums(arrays)
    wrong = [name for name in like if found[name] != written[name][2]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DamagedCheckpoint(f"{folder}: the checksum differs for {', '.join(wrong[:3])}{more}")
    return arrays


def _raise_everywhere(problem: str | None) -> None:
    """Raises DamagedCheckpoint in every process if any of them met a problem."""
    met = processes_where(problem is not None)
    if problem is None and met:
        problem = f"process {met[0]} found a damaged file; its output names it"
    if problem is not None:
        raise DamagedCheckpoint(problem)


def _check_same_state(written: dict[str, Any], like: dict[str, jax.ShapeDtypeStruct], folder: Place) -> None:
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
