"""A cleaned copy of the files that were looked at, and a log of what went and why. The files themselves are never changed."""

import base64
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.data.examples import RowError
from sft_jax.data.sources.json_files import is_array
from sft_jax.data.sources.pieces import Piece, Pieces, packing
from sft_jax.data.sources.text_files import BOM, begin_of_text, suffix_of
from sft_jax.doctor.checks import CHECKS
from sft_jax.doctor.collection import Collection, InputSet
from sft_jax.doctor.collector import Collector
from sft_jax.errors import UserError, did_you_mean

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class _Cleaned(NamedTuple):
    """A file and its copy."""

    name: str
    set: str
    copy: str  # below the folder
    rows: range  # numbers in the collection


def removed_kinds(named: Sequence[str], fix: str | None) -> tuple[str, ...]:
    """Returns the kinds of fault whose rows are left out: those named, or without any those that CHECKS says.

    What cannot be read can never be copied. Raises UserError for a name that is none.
    """
    for kind in named:
        if kind not in CHECKS:
            raise UserError(f"--fix_kinds: unknown kind '{kind}'; {did_you_mean(kind, CHECKS)}.")
    if named and fix is None:
        raise UserError("--fix_kinds: changes nothing without --fix; name a folder for the cleaned copy, or leave it out.")
    return tuple(kind for kind, check in CHECKS.items() if kind == "unreadable" or (kind in named if named else check.removed))


def prepare_folder(path: str) -> None:
    """Raises UserError where a cleaned copy cannot go to `path`: it must be a folder that is new or empty."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UserError(f"--fix: {path}: is not empty; name a new folder.")
    elif folder.exists():
        raise UserError(f"--fix: {path}: is a file; name a new folder.")
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"--fix: {path}: cannot be made, since {existing} cannot be written; name another folder.")


def write_cleaned(path: str, rows: Collection, collector: Collector, kinds: Sequence[str], log: Callable[[str], None]) -> None:
    """Writes the rows without faults of `kinds` to the folder `path`, which appears whole or not at all.

    Each file becomes one of JSON Lines at SPLIT/SET/NAME.jsonl, with the bytes of its rows where it is one already, packed or not.
    removed.jsonl has the other rows, with file, line, kind and detail; summary.json counts. Raises UserError where the disk
    does not take it.
    """
    folder = Path(path).expanduser().absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            counts = _write(staging, rows, collector, kinds)
            os.chmod(staging, 0o777 & ~_umask())
            os.replace(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"--fix: {path}: cannot be written ({error.strerror}); free space or name another folder.") from error
    log(f"{path}: {counts['kept']:,} of {counts['kept'] + counts['removed']:,} rows; removed.jsonl says why the others went.")


def _write(folder: Path, rows: Collection, collector: Collector, kinds: Sequence[str]) -> Counter:
    total: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    files = []
    changed: Counter[str] = Counter()
    with open(folder / "removed.jsonl", "w", encoding="utf-8", errors="backslashreplace") as removed:
        for file in _files(rows):
            kept = 0
            (folder / file.copy).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / file.copy, "wb") as copy:
                for row, data in _contents(rows, file, changed):
                    faults = collector.faults(row, kinds)
                    if not faults:
                        copy.write(data)
                        kept += 1
                        continue
                    by_kind[faults[0][0]] += 1
                    removed.write(json.dumps(_record(rows, row, file, faults, data), ensure_ascii=False) + "\n")
            if not kept:  # a file without rows is refused when it is read
                (folder / file.copy).unlink()
            total.update(kept=kept, removed=len(file.rows) - kept)
            files.append(
                {
                    "file": file.name,
                    "set": file.set,
                    "copy": file.copy if kept else None,
                    "kept": kept,
                    "removed": len(file.rows) - kept,
                }
            )
    summary = {
        **total,
        "removed_by_kind": {kind: by_kind[kind] for kind in kinds if by_kind[kind]},
        "kinds": list(kinds),
        "files": files,
        "columns_changed": dict(changed),  # bytes are in base64 in the copy, what is no number is null
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    return total


def _record(rows: Collection, row: int, file: _Cleaned, faults: list[tuple[str, str]], data: bytes) -> dict[str, Any]:
    """Returns the line of removed.jsonl: the first fault that took the row, the kinds of further ones, and the row."""
    try:
        content = _plain(rows.row(row))
    except RowError:
        content = data.decode("utf-8", "backslashreplace").strip()
    (kind, detail), *others = faults
    return {
        "file": file.name, "line": rows.where(row).line, "set": file.set, "kind": kind, "detail": detail,
        "also": [kind for kind, _ in others], "row": content,
    }  # fmt: skip


def _files(rows: Collection) -> list[_Cleaned]:
    """Returns the files of data sets with names for their copies, no two of which are the same."""
    result: list[_Cleaned] = []
    taken: set[str] = set()
    for number, item in enumerate(rows.sets):
        if item.split == "benchmark":
            continue
        begin = int(rows.bases[number])
        for name in item.rows.names:
            end = begin
            while end < rows.bases[number + 1] and rows.where(end).file == name:
                end += 1
            result.append(_Cleaned(name, item.key, _copy_name(item, name, taken), range(begin, end)))
            begin = end
    return result


def _copy_name(item: InputSet, name: str, taken: set[str]) -> str:
    folder = "/".join(re.sub(r"[^\w-]", "_", part) for part in item.key.removeprefix("data.").split(".", 1))
    stem = os.path.splitext(os.path.basename(name)[: len(os.path.basename(name)) - len(packing(name))])[0]
    copy, count = f"{folder}/{stem}.jsonl", 1
    while copy.casefold() in taken:
        count += 1
        copy = f"{folder}/{stem}-{count}.jsonl"
    taken.add(copy.casefold())
    return copy


def _contents(rows: Collection, file: _Cleaned, changed: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """Yields (row, its line) of a file: the bytes of the file where it has a row on each line.

    `changed` gets the columns with values that JSON cannot hold, and of how many rows.
    """
    path = os.path.expanduser(file.name)
    if os.path.isfile(path) and suffix_of(path) in JSON_SUFFIXES:
        pieces = Pieces()  # its files are closed when it is gone
        piece = pieces.open(path, file.name)
        if suffix_of(path) != ".json" or not is_array(piece, begin_of_text(piece, file.name)):
            yield from _lines(rows, file, piece)
            return
    for row in file.rows:
        try:
            content = {name: _plain(value) for name, value in rows.row(row).items()}
            changed.update(name for name, value in rows.row(row).items() if content[name] != value)
            # Half a surrogate pair, in a field that nothing reads, is written as JSON escapes it.
            yield row, json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        except RowError:
            yield row, b""


def _lines(rows: Collection, file: _Cleaned, piece: Piece) -> Iterator[tuple[int, bytes]]:
    lines = enumerate(piece.lines(), 1)
    for row in file.rows:
        wanted = rows.where(row).line
        line = next((line for number, line in lines if number == wanted), None)
        if line is None:
            raise UserError(f"{file.name}: has changed since it was first read; start again.")
        yield row, (line.removeprefix(BOM) if wanted == 1 else line).rstrip(b"\n") + b"\n"


def _plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: bytes in base64, what is no number as null, what else there is as text."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
