"""The files of a ledger, Parquet, so that whatever reads tables reads them.

    ledger/documents.parquet              what is trained on, a row a document, in the order of the data
    ledger/steps_00000001_00000500.parquet   exposures of these steps: what the loss was of each document that was in one

A document is an example, or a piece of one that was too long. Parts end where checkpoints do, and on resume those of later steps
are cut off, so the exposures of a run that was stopped are those of a run that never was.
"""

import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_jax.data.packing.corpus import Corpus
from sft_jax.data.packing.overlength import supervised_targets
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.errors import UserError

FOLDER = "ledger"  # in the workdir of a run
DOCUMENTS = "documents.parquet"
FORMAT = 1
_PART = re.compile(r"steps_(\d{8,})_(\d{8,})\.parquet")
_EXPOSURES = pa.schema([
    ("step", pa.int32()),
    ("document", pa.int32()),  # its row in documents.parquet
    ("loss_sum", pa.float32()),  # of weight * negative log-likelihood, in nats; NaN in a step that was left out
    ("weight", pa.float32()),
    ("correct", pa.float32()),  # sum of weights where the target is the argmax
])  # fmt: skip


@dataclass(frozen=True)
class Exposures:
    """Documents as they came up, in the order of the steps; all arrays are [exposures]."""

    step: np.ndarray  # int32, from 1 on
    document: np.ndarray  # int32
    loss_sum: np.ndarray  # float32
    weight: np.ndarray  # float32
    correct: np.ndarray  # float32

    def __len__(self) -> int:
        return len(self.step)

    def select(self, keep: np.ndarray) -> "Exposures":
        return Exposures(*(values[keep] for values in vars(self).values()))

    @staticmethod
    def concatenate(parts: "list[Exposures]") -> "Exposures":
        none = tuple(np.zeros(0, field.type.to_pandas_dtype()) for field in _EXPOSURES)
        return Exposures(*map(np.concatenate, zip(none, *(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Documents:
    """What is trained on; all arrays are [documents]."""

    set: np.ndarray  # number of the set in `sets`
    file: np.ndarray  # number of the file in `files`
    line: np.ndarray
    row: np.ndarray  # number of the row in its set, from 0 on
    turn: np.ndarray  # -1, or the assistant turn that the example was made for
    start: np.ndarray  # token of the example at which the document begins; 0 of a whole one
    supervised: np.ndarray  # supervised tokens
    sets: tuple[dict[str, Any], ...]  # "name", "rows" (the fingerprint of its files), "format"
    files: tuple[str, ...]
    plan_hash: str

    def __len__(self) -> int:
        return len(self.set)

    def where(self, document: int) -> str:
        """Returns "file:line", with the turn where that is needed to tell the example."""
        turn = f" (turn {self.turn[document]})" if self.turn[document] >= 0 else ""
        return f"{self.files[self.file[document]]}:{self.line[document]}{turn}"


def placed(stream: RowStream, first: int, last: int, *sums: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the documents of the rows [first, last) of a stream, in the order of rows and segments, and of each its sums.

    `sums` are [A, B, S] or have any other leading dimensions of at least last - first rows in their order; a document has one number
    of each.
    """
    offsets = stream.plan.offsets[first : last + 1]
    used = np.arange(sums[0].shape[-1]) < np.diff(offsets)[:, None]
    return stream.plan.documents[offsets[0] : offsets[-1]], *(values.reshape(-1, values.shape[-1])[: len(used)][used] for values in sums)


def part_name(first: int, last: int) -> str:
    """Returns the name of the part of the steps `first` to `last`."""
    return f"steps_{first:08d}_{last:08d}.parquet"


def part_steps(name: str) -> tuple[int, int] | None:
    """Returns the (first, last) step of a part, None for another file."""
    match = _PART.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def encode_exposures(exposures: Exposures) -> bytes:
    """Returns the content of a part."""
    return _encoded(vars(exposures).values(), _EXPOSURES)


def encode_documents(stream: RowStream, fingerprints: dict[str, str]) -> bytes:
    """Returns the content of documents.parquet; `fingerprints` are those of the rows of each set, by name."""
    corpus, documents = stream.corpus, stream.documents
    numbers = np.searchsorted(corpus.bases, documents.example, side="right") - 1
    names = dict.fromkeys(name for store in corpus.stores for name in store.file_names)
    place_of = {name: place for place, name in enumerate(names)}
    files = [np.array([place_of[name] for name in store.file_names], np.int32)[store.files.whole()] for store in corpus.stores]
    sets = [
        {"name": name, "rows": fingerprints[name], "format": store.meta["format"]}
        for name, store in zip(corpus.names, corpus.stores, strict=True)
    ]
    head = {"format": FORMAT, "plan_hash": stream.plan_hash, "sets": sets, "files": list(names)}
    columns = {
        "set": numbers.astype(np.int32),
        "file": np.concatenate(files)[documents.example],
        "line": _field(corpus, "lines")[documents.example],
        "row": _field(corpus, "rows")[documents.example],
        "turn": _field(corpus, "turns")[documents.example],
        "start": documents.start.astype(np.int32),
        "supervised": supervised_targets(corpus, documents).astype(np.int32),
    }
    schema = pa.schema([(name, pa.from_numpy_dtype(values.dtype)) for name, values in columns.items()], {"ledger": json.dumps(head)})
    return _encoded(columns.values(), schema)


def read_documents(folder: Path) -> Documents:
    """Reads documents.parquet of a ledger. Raises UserError naming the file where it is none."""
    place = folder / DOCUMENTS
    table = _read(place)
    try:
        head = json.loads((table.schema.metadata or {})[b"ledger"])
        if head["format"] != FORMAT:
            raise UserError(f"{place}: is of format {head['format']} and this version reads {FORMAT}; read it with the version that wrote it.")
        columns = {name: table[name].to_numpy() for name in ("set", "file", "line", "row", "turn", "start", "supervised")}
        return Documents(**columns, sets=tuple(head["sets"]), files=tuple(head["files"]), plan_hash=head["plan_hash"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{place}: is no part of a ledger ({error!r}); restore it, or train again in another --workdir.") from error


def read_exposures(folder: Path) -> tuple[Exposures, list[tuple[int, int]]]:
    """Returns all exposures of a ledger, and the (first, last) steps of its parts, in the order of the steps.

    Raises UserError naming the file where one is damaged.
    """
    found = sorted((steps, path) for path in folder.iterdir() if (steps := part_steps(path.name)))
    parts = [read_part(path) for _, path in found]
    return Exposures.concatenate(parts), [steps for steps, _ in found]


def read_part(path: Path) -> Exposures:
    """Returns the exposures of one part. Raises UserError naming the file where it is damaged."""
    table = _read(path)
    if not table.schema.equals(_EXPOSURES):
        raise UserError(f"{path}: has other columns than a part of a ledger; restore it, or move it away.")
    return Exposures(*(table[name].to_numpy() for name in _EXPOSURES.names))


def _field(corpus: Corpus, name: str) -> np.ndarray:
    """Returns a field of the stores for all examples."""
    return np.concatenate([getattr(store, name).whole() for store in corpus.stores])


def _encoded(columns: Iterable[np.ndarray], schema: pa.Schema) -> bytes:
    # Through buffers: what takes arrays as they are asks first whether they are of pandas, and imports it, most of a second at a start.
    arrays = [
        pa.Array.from_buffers(field.type, len(values), [None, pa.py_buffer(np.ascontiguousarray(values, field.type.to_pandas_dtype()))])
        for field, values in zip(schema, columns, strict=True)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays, schema=schema), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing; name the folder of a run with log.ledger=True (the default), and restore what was removed from it."
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); restore it from a copy.") from error
