"""Rows of text written as every kind of data that is read: KINDS is name -> writer of (folder, rows) -> name of the data."""

import csv
import gzip
import io
import json
import sys
import types
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter

FEW = 64  # rows in a row group or a record batch


def zstd(data):
    target = pa.BufferOutputStream()
    with pa.CompressedOutputStream(target, "zstd") as packed:
        packed.write(data)
    return target.getvalue().to_pybytes()


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows, delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def example(row):
    from tensorflow_datasets.proto import tf_example_pb2

    made = tf_example_pb2.Example()
    for name, value in row.items():
        made.features.feature[name].bytes_list.value.append(value.encode())
    return made.SerializeToString()


def write_stream(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=FEW)


def bytes_of(suffix, make):
    def write(folder, rows):
        (folder / f"rows{suffix}").write_bytes(make(rows))
        return str(folder / f"rows{suffix}")

    return write


def parquet(folder, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=FEW)
    return str(folder / "rows.parquet")


def feather(folder, rows):
    pa.feather.write_feather(pa.Table.from_pylist(rows), str(folder / "rows.feather"), compression="lz4", chunksize=FEW)
    return str(folder / "rows.feather")


def arrow(folder, rows):
    write_stream(folder / "rows.arrow", rows)
    return str(folder / "rows.arrow")


def array_record(folder, rows):
    write_records(folder / "rows.array_record", [json.dumps(row).encode() for row in rows])
    return str(folder / "rows.array_record")


def array_record_of_examples(folder, rows):
    write_records(folder / "rows.arrayrecord", [example(row) for row in rows])
    return str(folder / "rows.arrayrecord")


def saved(folder, rows):
    """What `datasets.Dataset.save_to_disk` writes, in two files."""
    files = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    half = -(-len(rows) // 2)
    write_stream(folder / files[0], rows[:half])
    write_stream(folder / files[1], rows[half:] or rows[:0])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files], "_split": None}))
    return f"hf:{folder}"


def tfds_builder(folder, rows, features=None):
    """Prepares a data set of TFDS and returns the builder."""
    import tensorflow_datasets as tfds

    package = Path(folder) / "package"
    package.mkdir(exist_ok=True)
    module = types.ModuleType("rows_builder")
    module.__file__ = str(package / "rows_builder.py")
    sys.modules[module.__name__] = module

    class RowsBuilder(tfds.core.GeneratorBasedBuilder):
        __module__ = module.__name__
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain")]
        pkg_dir_path = package

        def _info(self):
            kinds = features or {name: tfds.features.Text() for name in rows[0]}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds), disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    tfds.core.registered._DATASET_REGISTRY.pop("rows_builder", None)
    builder = RowsBuilder(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return builder


def tfds_set(folder, rows):
    tfds_builder(folder, rows)
    return "tfds:rows_builder/plain:train"


def remote(folder, rows):
    path = f"memory://{folder}/rows.jsonl"
    fsspec.filesystem("memory").pipe_file(path, json_lines(rows))
    return path


KINDS = {
    "jsonl": bytes_of(".jsonl", json_lines),
    "ndjson": bytes_of(".ndjson", json_lines),
    "json": bytes_of(".json", lambda rows: json.dumps(rows, indent=1).encode()),
    "jsonl.gz": bytes_of(".jsonl.gz", lambda rows: gzip.compress(json_lines(rows), mtime=0)),
    "jsonl.zst": bytes_of(".jsonl.zst", lambda rows: zstd(json_lines(rows))),
    "csv": bytes_of(".csv", lambda rows: separated(rows, ",")),
    "csv.zst": bytes_of(".csv.zst", lambda rows: zstd(separated(rows, ","))),
    "tsv": bytes_of(".tsv", lambda rows: separated(rows, "\t")),
    "parquet": parquet,
    "arrow": arrow,
    "feather": feather,
    "array_record": array_record,
    "arrayrecord": array_record_of_examples,
    "hf": saved,
    "tfds": tfds_set,
    "memory": remote,
}
LINES = ("jsonl", "ndjson", "json", "csv", "tsv", "memory")  # kinds with lines; those of others are numbers of rows
BINARY = ("jsonl.gz", "jsonl.zst", "csv.zst", "parquet", "arrow", "feather", "array_record", "arrayrecord", "hf", "tfds")
