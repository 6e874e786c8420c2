"""The store of prepared examples: flat little-endian files, one per field and shard, read through memmap.

    FOLDER/
      manifest.json          written last: without it the folder is not a store
      00000.ids ...          one file per field of the shard, see FIELDS
      bad_rows.jsonl         rows that could not be used: row, file, line, reason; watched where the watchdog ended it

Weights are stored as runs (length, value), since a conversation has a few spans and many tokens. The manifest
holds the size and the hash of every file; `open_store` checks them, so a damaged store is named instead of trained on.
Stores are written by sft_jax.data.store_writer.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 2  # of the files; part of the manifest and of the tokens fingerprint
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


class Store:
    """A complete store. Arrays over examples are in memory; token ids stay on disk, one memmap a shard."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.meta: dict[str, Any] = manifest["meta"]
        self.file_names: list[str] = manifest["files"]
        self.bad_rows: list[dict[str, Any]] = _read_json_lines(folder / "bad_rows.jsonl")
        shards = manifest["shards"]
        self.content = _content_hash(shards)  # of all that rows are made of: tokens, weights, turns

        def column(name: str) -> np.ndarray:
            parts = [np.fromfile(folder / f"{index:05d}.{name}", FIELDS[name]) for index in range(len(shards))]
            return np.concatenate(parts) if parts else np.zeros(0, FIELDS[name])

        self.lengths = column("lengths").astype(np.int64)
        self.run_counts = column("run_counts").astype(np.int64)
        self.run_lengths = column("run_lengths").astype(np.int64)
        self.run_weights = column("run_weights")
        self.rows = column("rows")
        self.files = column("files")
        self.lines = column("lines")
        self.turns = column("turns")
        self.turn_counts = column("turn_counts").astype(np.int64)
        self.turn_ends = np.cumsum(self.turn_counts)  # into turn_starts and turn_roles
        self.turn_starts = column("turn_starts").astype(np.int64)
        self.turn_roles = column("turn_roles")
        self.ids = [
            np.asarray(np.memmap(folder / f"{index:05d}.ids", manifest["id_dtype"], mode="r"))
            for index, shard in enumerate(shards)
            if shard["tokens"]
        ]

    def __len__(self) -> int:
        return len(self.lengths)

    def where(self, example: int) -> str:
        """Returns "file:line" of an example."""
        return f"{self.file_names[self.files[example]]}:{self.lines[example]}"


def open_store(folder: Path) -> Store | None:
    """Returns the store in `folder`, or None where there is none.

    Raises StoreDamaged, naming the file, where a file is missing, cut or changed. Reads every byte once.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT or manifest["hash"] != manifest_hash(manifest):
            raise StoreDamaged(f"{path} was changed")
        expected = {
            f"{index:05d}.{name}": entry
            for index, shard in enumerate(manifest["shards"])
            for name, entry in shard["files"].items()
        }
        expected["bad_rows.jsonl"] = manifest["bad_rows"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamaged(f"{path} is not a manifest ({error})") from error
    for name, entry in expected.items():
        file = folder / name
        if not file.exists():
            raise StoreDamaged(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise StoreDamaged(f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}")
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        digests = pool.map(lambda name: _file_digest(folder / name), expected)
        for (name, entry), digest in zip(expected.items(), digests, strict=True):
            if digest != entry["hash"]:
                raise StoreDamaged(f"{folder / name} was changed")
    return Store(folder, manifest)


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


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Returns the hash of a manifest without its own entry "hash"."""
    body = {key: value for key, value in manifest.items() if key != "hash"}
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _content_hash(shards: list[dict[str, Any]]) -> str:
    files = [{name: entry["hash"] for name, entry in shard["files"].items() if name not in _IDENTITY} for shard in shards]
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
