"""The store of prepared examples: flat little-endian files, one per field and shard, read through memmap.

    FOLDER/
      00000/ 00001/ ...      shards: one folder for every SHARD_ROWS rows of the data set, in their order
        ids lengths ...      one file per field, see FIELDS
        bad_rows.jsonl       rows that could not be used: row, file, line, reason; watched where the watchdog ended it
        shard.json           size and hash of these files, and counts; written last: without it the folder is no shard
      manifest.json          which shards are the store; written last: without it the folder is no store

What holds under certain circumstances only has these in its name: 00000-2026-01-31, manifest-2026-01-31.json; see
sft_jax.data.stores.circumstances. So one folder can hold several stores, which share the shards that do not differ.

Weights are stored as runs (length, value), since a conversation has a few spans and many tokens. `open_store` checks every
byte against the hashes, so a damaged store is named instead of trained on. sft_jax.data.stores.store_writer writes shards and manifests.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 2  # of the files; part of the records and of the tokens fingerprint
SHARD_ROWS = 1 << 16  # rows of a data set that make a shard, whoever writes it
SHARD_RECORD, BAD_ROWS = "shard.json", "bad_rows.jsonl"
ROLES = ("other", "system", "user", "assistant", "tool")  # codes of `turn_roles`

FIELDS = {
    "ids": "<u4",  # [tokens]; "<u2" where the vocabulary allows
    "lengths": "<u4",  # [examples], tokens of each example
    "run_counts": "<u4",  # [examples], weight runs of each example
    "run_lengths": "<u4",  # [runs], tokens; those of an example sum to its length
    "run_weights": "<f4",  # [runs]
    "rows": "<i8",  # [examples], number of the row in its data set
    "files": "<i4",  # [examples], index into the manifest's "files"
    "lines": "<i8",  # [examples]
    "turns": "<i4",  # [examples], -1 or the assistant turn of a per-turn example
    "turn_counts": "<u4",  # [examples], messages of each example
    "turn_starts": "<u4",  # [messages], token offset at which a message begins
    "turn_roles": "<u1",  # [messages], code of the role
}
_IDENTITY = ("rows", "files", "lines", "turns")  # fields that say where an example is from, not what it holds


class Encoded(NamedTuple):
    """Examples as flat arrays, as workers hand them over. Ragged fields are concatenated in example order."""

    ids: np.ndarray  # int [tokens]
    lengths: np.ndarray  # int [examples]
    run_counts: np.ndarray  # int [examples]
    run_lengths: np.ndarray  # int [runs]
    run_weights: np.ndarray  # float32 [runs]
    rows: np.ndarray  # int [examples], number of the row in its data set
    turns: np.ndarray  # int [examples]
    turn_counts: np.ndarray  # int [examples]
    turn_starts: np.ndarray  # int [messages]
    turn_roles: np.ndarray  # uint8 [messages]


class StoreDamaged(Exception):
    """A store's files are not what its manifest says. The message names the file."""


class Shard(NamedTuple):
    """A complete shard, whose files were just checked or written."""

    folder: Path
    record: dict[str, Any]  # format, rows [first, stop], id_dtype, tokens, examples, counted, files, hash

    @property
    def bad_rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / BAD_ROWS).read_text().splitlines()]

    def field(self, name: str) -> np.ndarray:
        """Returns the array of a field, read from the disk where it is used."""
        kind = self.record["id_dtype"] if name == "ids" else FIELDS[name]
        if not self.record["files"][name]["bytes"]:
            return np.zeros(0, kind)
        return np.asarray(np.memmap(self.folder / name, kind, mode="r"))


class Store:
    """A complete store. What planning needs is in memory, 8 bytes an example and 12 a run; all else stays on disk."""

    def __init__(self, folder: Path, suffix: str, manifest: dict[str, Any], shards: Sequence[Shard]):
        self.folder, self.name = folder, f"{folder.name}{suffix}"
        self.meta: dict[str, Any] = manifest["meta"]
        self.file_names: list[str] = manifest["files"]
        self.bad_rows: list[dict[str, Any]] = [row for shard in shards for row in shard.bad_rows]
        self.content = _content_hash(shards)  # of all that rows are made of: tokens, weights, turns
        self.lengths = _joined([shard.field("lengths") for shard in shards], np.int64)
        self.run_lengths = _joined([shard.field("run_lengths") for shard in shards], np.int64)
        self.run_weights = _joined([shard.field("run_weights") for shard in shards], np.float32)
        self.ids = [ids for shard in shards if len(ids := shard.field("ids"))]
        self.rows, self.files, self.lines, self.turns, self._turn_counts, self._turn_starts, self._turn_roles = (
            Mapped([shard.field(name) for shard in shards])
            for name in ("rows", "files", "lines", "turns", "turn_counts", "turn_starts", "turn_roles")
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def where(self, example: int) -> str:
        """Returns "file:line" of an example."""
        return f"{self.file_names[self.files[example]]}:{self.lines[example]}"

    def turns_of(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (token offsets at which the messages of an example begin, their role codes), see ROLES."""
        first, last = self._turn_bounds[example : example + 2].tolist()
        return self._turn_starts.part(first, last).astype(np.int64), self._turn_roles.part(first, last)

    @cached_property
    def _turn_bounds(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self._turn_counts.whole(), dtype=np.int64)])  # into messages


class Mapped:
    """A field of all shards end to end, of which only what is asked for is read."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = list(parts)
        self._bounds = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])

    def __getitem__(self, index: int) -> int:
        shard = int(np.searchsorted(self._bounds, index, side="right")) - 1
        return int(self._parts[shard][index - int(self._bounds[shard])])

    def part(self, first: int, last: int) -> np.ndarray:
        """Returns the elements [first, last), which lie in one shard."""
        shard = min(int(np.searchsorted(self._bounds, first, side="right")) - 1, len(self._parts) - 1)
        base = int(self._bounds[shard])
        return self._parts[shard][first - base : last - base]

    def whole(self) -> np.ndarray:
        return np.concatenate(self._parts)


def open_store(folder: Path, suffix: str = "") -> Store | None:
    """Returns the store of a manifest in `folder`, or None where there is none.

    Args:
        suffix: of the manifest's name, see sft_jax.data.stores.circumstances.

    Raises StoreDamaged, naming the file, where a file is missing, cut or changed. Reads every byte once.
    """
    path = manifest_path(folder, suffix)
    if not path.exists():
        return None
    manifest = _read_record(path)
    try:
        expected = {entry["folder"]: entry["hash"] for entry in manifest["shards"]}
    except (KeyError, TypeError) as error:
        raise StoreDamaged(f"{path} is not a manifest ({error})") from error
    shards = []
    for name, digest in expected.items():
        shard = open_shard(folder / name)
        if shard is None:
            raise StoreDamaged(f"{folder / name / SHARD_RECORD} is missing")
        if shard.record["hash"] != digest:
            raise StoreDamaged(f"{folder / name / SHARD_RECORD} was changed")
        shards.append(shard)
    return Store(folder, suffix, manifest, shards)


def open_shard(folder: Path) -> Shard | None:
    """Returns the shard in `folder`, or None where there is no complete one; raises StoreDamaged as `open_store`."""
    path = folder / SHARD_RECORD
    if not path.exists():
        return None
    record = _read_record(path)
    try:
        expected = {name: (entry["bytes"], entry["hash"]) for name, entry in record["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreDamaged(f"{path} is not the record of a shard ({error})") from error
    for name, (size, _) in expected.items():
        file = folder / name
        if not file.exists():
            raise StoreDamaged(f"{file} is missing")
        if file.stat().st_size != size:
            raise StoreDamaged(f"{file} has {file.stat().st_size} bytes instead of {size}")
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        for name, digest in zip(expected, pool.map(lambda name: _file_digest(folder / name), expected), strict=True):
            if digest != expected[name][1]:
                raise StoreDamaged(f"{folder / name} was changed")
    return Shard(folder, record)


def manifest_path(folder: Path, suffix: str = "") -> Path:
    return folder / f"manifest{suffix}.json"


def shard_path(folder: Path, number: int, suffix: str = "") -> Path:
    return folder / f"{number:05d}{suffix}"


def _read_record(path: Path) -> dict[str, Any]:
    """Returns a manifest or the record of a shard; raises StoreDamaged where it is not as it was written."""
    try:
        record = json.loads(path.read_text())
        whole = record["format"] == FORMAT and record["hash"] == record_hash(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamaged(f"{path} is no record ({error})") from error
    if not whole:
        raise StoreDamaged(f"{path} was changed")
    return record


def encode(examples: Sequence[tuple[int, np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]]) -> Encoded:
    """Returns examples as flat arrays. Each is (row, ids [n], weights [n], turn, turn_starts [m], turn_roles [m])."""
    rows, ids, weights, turns, starts, roles = zip(*examples, strict=True) if examples else ((),) * 6
    lengths = np.array([len(part) for part in ids], np.int64)
    if [len(part) for part in weights] != lengths.tolist():
        raise ValueError("an example has not as many weights as ids")
    run_counts, run_lengths, run_weights = weight_runs(_joined(weights, np.float32), lengths)
    return Encoded(
        ids=_joined(ids, np.int32),
        lengths=lengths,
        run_counts=run_counts,
        run_lengths=run_lengths,
        run_weights=run_weights,
        rows=np.array(rows, np.int64),
        turns=np.array(turns, np.int64),
        turn_counts=np.array([len(part) for part in starts], np.int64),
        turn_starts=_joined(starts, np.int64),
        turn_roles=_joined(roles, np.uint8),
    )


def weight_runs(weights: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (runs of each example, lengths of the runs, their weights) of the concatenated weights of examples.

    A run ends where the weight changes or the example does.

    >>> weight_runs(np.array([0, 1, 1, 1, 0.5], np.float32), np.array([3, 2]))
    (array([2, 2]), array([1, 2, 1, 1]), array([0. , 1. , 1. , 0.5], dtype=float32))
    """
    begins = np.ones(len(weights), bool)
    begins[1:] = weights[1:] != weights[:-1]
    firsts = np.cumsum(lengths) - lengths
    begins[firsts[lengths > 0]] = True
    starts = np.flatnonzero(begins)
    counts = np.diff(np.searchsorted(starts, np.append(firsts, len(weights))))
    return counts, np.diff(np.append(starts, len(weights))), weights[starts]


def _joined(parts: Sequence, kind) -> np.ndarray:
    return np.concatenate(parts, dtype=kind, casting="unsafe") if len(parts) else np.zeros(0, kind)


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def record_hash(record: dict[str, Any]) -> str:
    """Returns the hash of a manifest, or the record of a shard, without its own entry "hash"."""
    body = {key: value for key, value in record.items() if key != "hash"}
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _content_hash(shards: Sequence[Shard]) -> str:
    names = [name for name in FIELDS if name not in _IDENTITY]
    files = [{name: shard.record["files"][name]["hash"] for name in names} for shard in shards]
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=16).hexdigest()
