"""The manifest of a checkpoint: what makes a step exist, and what every file of it is compared with.

The first line is the digest of the rest, so that a manifest that was cut or changed is noticed too.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sft_jax.checkpoint.storage import Place, digests, file_digest
from sft_jax.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be used; the message says what of it is wrong."""


def step_folders(folder: Place) -> list[int]:
    """Returns the steps that have a folder in `folder`, whatever it holds, oldest first.

    Only names that a save would choose count: `3.backup` or `best` belong to the user.
    """
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir()]
    return sorted(int(name) for name in names if str(int(name)) == name)


def committed_steps(folder: Place) -> list[int]:
    """Returns the steps in `folder` that have a manifest, oldest first."""
    return [step for step in step_folders(folder) if (folder / str(step) / MANIFEST).is_file()]


def read_manifest(folder: Place) -> dict[str, Any]:
    """Returns the manifest of the checkpoint in `folder`. Raises DamagedCheckpoint if it is not what was written."""
    path = folder / MANIFEST
    try:
        digest, _, text = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise DamagedCheckpoint(f"{path} is not what was written: its digest differs")
    body = json.loads(text)
    if body["format"] != FORMAT:
        raise UserError(
            f"{folder}: has checkpoint format {body['format']}, and this version reads {FORMAT}. Use the version that wrote it."
        )
    return body


def write_manifest(folder: Place, body: dict[str, Any]) -> None:
    """Commits the checkpoint in `folder`: digests of all its files and `body`, on disk when this returns."""
    text = json.dumps({"format": FORMAT, **body, "files": digests(folder)}, sort_keys=True, allow_nan=False).encode()
    path = folder / MANIFEST
    content = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
    if not isinstance(path, Path):
        path.write_bytes(content)  # a store shows a file when it is whole
        return
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def damaged_file(folder: Place, written: dict[str, str], index: int, count: int) -> str | None:
    """Returns what is wrong with the files of a checkpoint, or None; compares the index-th of `count` shares of them.

    Args:
        written: digests by name, as `digests` gave them when the checkpoint was written.
    """
    try:
        remote = None if isinstance(folder, Path) else digests(folder)
        present = set(remote if remote else (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
        for name in sorted(present - {MANIFEST} - written.keys()):
            return f"{folder / name} was not there when the checkpoint was written"
        for name in sorted(written)[index::count]:
            if name not in present:
                return f"{folder / name} is missing"
            if (remote[name] if remote is not None else file_digest(folder / name)) != written[name]:
                return f"{folder / name} is not what was written: its digest differs"
    except OSError as error:  # a disk that cannot read a file any more, or a file that went away meanwhile
        return f"{error.filename or folder} cannot be read ({error.strerror or error})"
    return None
