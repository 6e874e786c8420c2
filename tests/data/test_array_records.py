"""Records of ArrayRecord files: JSON text, or tf.train.Example without TensorFlow; and TFDS, which is made of them."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from row_kinds import tfds_builder, write_records
from tensorflow_datasets.proto import tf_example_pb2

from sft_jax.data.examples import RowError
from sft_jax.data.sources.array_records import parse_record
from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=6), values, max_size=4), min_size=1, max_size=12))
def test_random_rows_come_back_equal(content):
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder, "a.array_record"), [json.dumps(row).encode() for row in content])
        assert list(open_rows([f"{folder}/a.array_record"], "data.train")) == content


def test_shards_are_files_of_their_kind(tmp_path):
    for number in range(2):
        write_records(tmp_path / f"a.array_record-0000{number}-of-00002", [b'{"n": %d}' % number])
    assert list(open_rows([f"{tmp_path}/a.array_record-*"], "data.train")) == [{"n": 0}, {"n": 1}]


def test_an_example_is_its_features():
    made = tf_example_pb2.Example()
    feature = made.features.feature
    feature["text"].bytes_list.value.append("ä".encode())
    feature["texts"].bytes_list.value.extend([b"a", b"b"])
    feature["n"].int64_list.value.append(-3)
    feature["f"].float_list.value.extend([0.5, 1.5])
    feature["raw"].bytes_list.value.append(b"\xff")
    feature["none"].bytes_list.SetInParent()
    feature["unset"].SetInParent()
    assert parse_record(made.SerializeToString()) == {
        "text": "ä", "texts": ["a", "b"], "n": -3, "f": [0.5, 1.5], "raw": b"\xff", "none": [], "unset": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"[1]", "is neither a JSON object nor a tf.train.Example; write each record as JSON text."),
        (b"\x81\xa1a\x01", "is neither a JSON object nor a tf.train.Example; write each record as JSON text."),  # msgpack
        (b"", "holds no field: it is neither a JSON object nor a tf.train.Example with features."),
        (b'{"a": 1', "is not valid JSON (Expecting ',' delimiter at column 8); correct or remove it."),
    ],
)
def test_a_record_that_is_no_row(tmp_path, record, message):
    write_records(tmp_path / "a.array_record", [b'{"n": 1}', record, b' {"n": 2}'])
    rows = open_rows([str(tmp_path / "a.array_record")], "data.train")
    assert rows[0] == {"n": 1} and rows[2] == {"n": 2}
    with pytest.raises(RowError) as caught:
        rows[1]
    assert str(caught.value) == message


@settings(deadline=None)
@given(st.binary(max_size=30))
def test_any_record_is_a_row_or_an_error_of_the_row(record):
    try:
        assert isinstance(parse_record(record), dict)
    except RowError:
        pass


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "a.array_record"
    for content, reason in (
        (b"{}\n", "is damaged .*64KB"),
        (b"junk" * 100_000, "is damaged .Corrupted Riegeli"),
        (b"\0" * (1 << 16), "holds no records, or is not a whole ArrayRecord file|is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^data.train: {path}: ({reason}).*; copy it again.$"):
            open_rows([str(path)], "data.train")



FEATURES = {
    "prompt": tfds.features.Text(),
    "messages": tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()}),
    "nested": tfds.features.FeaturesDict({"n": np.int64, "x": tfds.features.Tensor(shape=(2,), dtype=np.float32)}),
    "tags": tfds.features.Sequence(tfds.features.Text()),
    "deep": tfds.features.Sequence({"a": {"b": np.int64}, "c": np.bool_}),
    "label": tfds.features.ClassLabel(names=["bad", "good"]),
}
CONTENT = [
    {
        "prompt": f"é {number}", "messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": ""}][: number % 3],
        "nested": {"n": -number, "x": [0.5, number]}, "tags": ["a", "b"][: number % 3],
        "deep": [{"a": {"b": number}, "c": True}] * (number % 2), "label": ["bad", "good"][number % 2],
    }
    for number in range(20)
]  # fmt: skip


@pytest.mark.parametrize("size", range(100, 130))
def test_an_example_of_any_length_is_read(size):
    """One of 123 bytes begins with a newline and a brace, as JSON may."""
    made = tf_example_pb2.Example()
    made.features.feature["text"].bytes_list.value.append(b"x" * size)
    assert parse_record(made.SerializeToString()) == {"text": "x" * size}
    assert parse_record(b'\n{"text": "x"}') == {"text": "x"}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tfds_builder(tmp_path, CONTENT, FEATURES)


def refused(name, message):
    with pytest.raises(UserError) as caught:
        open_rows([name], "data.train")
    assert str(caught.value) == f"data.train: {name}{message}"


def test_tfds_features_are_plain_python(prepared):
    rows = open_rows(["tfds:rows_builder:train"], "data.train")
    assert list(rows) == CONTENT
    assert json.loads(json.dumps(rows[3])) == CONTENT[3]
    assert str(rows.where(3)) == "tfds:rows_builder:train/rows_builder-train.array_record-00000-of-00001:4"


@pytest.mark.parametrize("split", ["train", "train[:25%]", "train[-4:]", "train[5:9]", "train[15:]+train[:2]", "all"])
def test_tfds_slices_are_those_of_its_data_source(prepared, split):
    expected = tfds.data_source("rows_builder/plain", split=split, data_dir=str(prepared._data_dir_root))
    rows = open_rows([f"tfds:rows_builder/plain:1.0.0:{split}"], "data.train")
    assert [row["prompt"] for row in rows] == [row["prompt"].decode() for row in expected]
    assert len({str(rows.where(number)) for number in range(len(rows))}) == len(rows)


def test_tfds_fingerprints_follow_the_split(prepared):
    splits = ["train", "train[:50%]", "train[50%:]"]
    assert len({open_rows([f"tfds:rows_builder:{split}"], "data.train").fingerprint for split in splits}) == 3


def test_tfds_fingerprints_follow_the_names_of_labels(prepared, tmp_path):
    """They are what is read, and are neither in the records nor in the features' JSON."""
    before = open_rows(["tfds:rows_builder:train"], "data.train")
    (names,) = tmp_path.rglob("label.labels.txt")
    names.write_text("good\nbad\n")
    after = open_rows(["tfds:rows_builder:train"], "data.train")
    assert before[0]["label"] == "bad" and after[0]["label"] == "good" and after.fingerprint != before.fingerprint


def test_tfds_names_that_cannot_be_read(prepared, tmp_path):
    known = "it has train."
    refused("tfds:rows_builder", ": names no split of a TFDS data set; write it as tfds:name:split or tfds:name/config:split.")
    refused("tfds:rows_builder:test", f": has no such split (Unknown split 'test'. Should be one of ['train'].); {known}")
    refused("tfds:rows_builder:train[:200%]", f": has no such split (Error parsing split 'train[:200%]'. See format at: https://www.tensorflow.org/datasets/splits); {known}")
    remedy = "check its name, and TFDS_DATA_DIR, the folder in which it was prepared."
    refused("tfds:nothing/of/this:train", ": names no split of a TFDS data set; write it as tfds:name:split or tfds:name/config:split.")
    refused("tfds:nothing:train", f": TFDS knows and has no such data set (Dataset nothing not found.); {remedy}")
    refused(
        "tfds:imdb_reviews:train",
        f": is not prepared in {tmp_path}/imdb_reviews/plain_text/1.0.0; prepare it in Python with tfds.builder('imdb_reviews', "
        "file_format='array_record').download_and_prepare(), or set TFDS_DATA_DIR to the folder in which it was prepared.",
    )


def test_tfds_of_another_file_format(prepared, tmp_path):
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    refused(
        "tfds:rows_builder:train",
        ": is prepared as tfrecord, which has no rows by number; prepare it as ArrayRecord, in Python with "
        "tfds.builder('rows_builder', file_format='array_record').download_and_prepare().",
    )


def test_tfds_with_a_file_that_is_shorter_than_it_says(prepared, tmp_path):
    path = next(tmp_path.rglob("*array_record-*"))
    write_records(path, [b"{}"] * 7)
    refused("tfds:rows_builder:train", f": {path} has 7 of 20 records; prepare the data set again.")


def test_tfds_needs_no_tensorflow_and_jsonl_no_tfds(prepared, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    code = f"""
import sys
from sft_jax.data.sources.registry import open_rows
open_rows([{str(tmp_path / "a.jsonl")!r}], "data.train")[0]
heavy = [name for name in ("tensorflow_datasets", "huggingface_hub", "fsspec.core") if name in sys.modules]
assert not heavy, heavy
assert len(list(open_rows(["tfds:rows_builder:train"], "data.train"))) == 20
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
