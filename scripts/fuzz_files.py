"""Files for fuzzing: rows in every kind of file, and bytes of them changed."""

import csv
import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter


def break_bytes(data: bytes, choose: random.Random) -> bytes:
    """Returns bytes of a file with a few of them changed, removed, repeated or cut off."""
    broken = bytearray(data)
    for _ in range(choose.randrange(1, 6)):
        place = choose.randrange(len(broken) + 1)
        kind = choose.randrange(6)
        if kind == 0:
            broken[place : place + 1] = choose.randbytes(choose.randrange(4))
        elif kind == 1:
            broken[place : place + choose.randrange(40)] = b""
        elif kind == 2:
            broken[place:place] = broken[max(0, place - 30) : place]
        elif kind == 3:
            broken[place:place] = choose.choice([b"\xff", b"\x00", b'"', b"\n", b"\r", b"{", b"[" * 120, b"\\ud800", b",", b"9" * 5000, b"\xef\xbb\xbf"])
        elif kind == 4 and choose.random() < 0.3:
            del broken[place:]
        elif broken and place < len(broken):
            broken[place] ^= 1 << choose.randrange(8)
    return bytes(broken)


def _json_lines(rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=True, default=str).encode() + b"\n" for row in rows)


def _csv(rows, delimiter: str = ",") -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows({name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in row.items()} for row in rows)
    return text.getvalue().encode(errors="surrogatepass")


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


def _table(rows) -> pa.Table:
    return pa.table({"text": [json.dumps(row, default=str) for row in rows], "messages": [[{"role": "user", "content": "é"}]] * len(rows)})


def _parquet(rows) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(_table(rows), sink, row_group_size=4)
    return sink.getvalue()


def _feather(rows) -> bytes:
    sink = io.BytesIO()
    pa.feather.write_feather(_table(rows), sink, compression="lz4", chunksize=4)
    return sink.getvalue()


def _array_record(rows) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".array_record") as file:
        writer = ArrayRecordWriter(file.name, "group_size:2")
        for row in rows:
            writer.write(json.dumps(row, default=str).encode())
        writer.close()
        return Path(file.name).read_bytes()


def _arrow(rows) -> bytes:
    sink = io.BytesIO()
    table = _table(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FILES: dict[str, Callable[[list], bytes]] = {
    ".jsonl": _json_lines, ".json": lambda rows: json.dumps(rows, default=str).encode(), ".csv": _csv,
    ".jsonl.gz": lambda rows: gzip.compress(_json_lines(rows), 1), ".jsonl.zst": lambda rows: _zstd(_json_lines(rows)),
    ".csv.gz": lambda rows: gzip.compress(_csv(rows), 1), ".csv.zst": lambda rows: _zstd(_csv(rows)),
    ".json.gz": lambda rows: gzip.compress(json.dumps(rows, default=str).encode(), 1), ".tsv": lambda rows: _csv(rows, "\t"),
    ".parquet": _parquet, ".arrow": _arrow, ".feather": _feather, ".array_record": _array_record,
}  # fmt: skip
SAVED = "saved"  # what `datasets.Dataset.save_to_disk` writes, a folder
KINDS = (*FILES, SAVED)


def write(kind: str, rows: list, folder: Path, choose: random.Random | None) -> Path:
    """Writes rows in a kind of KINDS, one file of it broken where `choose` is given; returns what is to be opened."""
    if kind == SAVED:
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
        contents = {"data-00000-of-00001.arrow": _arrow(rows), "state.json": json.dumps(state).encode()}
        place = folder / SAVED
        place.mkdir(exist_ok=True)
    else:
        contents, place = {f"rows{kind}": FILES[kind](rows)}, folder
    broken = choose.choice(list(contents)) if choose else None
    for name, data in contents.items():
        (place / name).write_bytes(break_bytes(data, choose) if choose and name == broken else data)
    return place if kind == SAVED else place / f"rows{kind}"
