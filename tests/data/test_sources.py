"""Rows from files are the same as a plain reading of the files."""

import gc
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import lines, read, write
from row_kinds import zstd

from sft_jax.data.examples import RowError
from sft_jax.data.sources import json_files
from sft_jax.data.sources.registry import Where, open_rows
from sft_jax.errors import UserError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
rows_of_objects = st.lists(st.dictionaries(st.text(max_size=6), values, max_size=4), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    rows_of_objects,
    st.lists(st.sampled_from(["", " ", "\t", "\r", "  \t "]), max_size=3),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\n \r\n"]),
    st.sampled_from(["", "\n"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
)
def test_json_lines_are_the_lines_that_are_not_blank(content, first, between, end, ascii_only, bom, block):
    text = "".join(f"{blank}\n" for blank in first)
    text += between.join(json.dumps(row, ensure_ascii=ascii_only) for row in content) + end
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode("utf-8", "surrogatepass")
    expected = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "BLOCK", block)  # rows that lie across blocks
        for name in ("rows.jsonl", "rows.jsonl.gz"):
            path = write(Path(folder), name, data)
            rows = open_rows([path], "data.train")
            assert len(rows) == len(expected) == len(content)
            assert [rows.where(index) for index in range(len(rows))] == [Where(path, number) for number, _ in expected]
            for index, row in enumerate(content):
                try:
                    json.dumps(row, ensure_ascii=ascii_only).encode()
                except UnicodeEncodeError:  # half of a surrogate pair, written as it is, is no UTF-8
                    with pytest.raises(RowError, match="UTF-8"):
                        rows[index]
                else:
                    assert rows[index] == row


@settings(max_examples=60, deadline=None)
@given(
    rows_of_objects,
    st.sampled_from([None, 0, 2]),
    st.sampled_from([",", ", ", ",\n", "\n ,\r\n\t"]),
    st.booleans(),
    st.booleans(),
)
def test_a_json_array_is_its_elements(content, indent, comma, ascii_only, packed):
    text, expected = "\n [ ", []
    for index, row in enumerate(content):
        text += comma if index else ""
        expected.append(text.count("\n") + 1)
        text += json.dumps(row, indent=indent, ensure_ascii=ascii_only)
    text += "\n]\n"
    if len(set(expected)) < len(expected):  # lines would not tell rows apart
        expected = list(range(1, len(expected) + 1))
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    with tempfile.TemporaryDirectory() as folder:
        assert read(write(Path(folder), "rows.json.gz" if packed else "rows.json", data)) == (content, expected)


def test_json_lines_in_a_json_file(tmp_path):
    path = write(tmp_path, "rows.json", lines({"a": 1}, {"a": 2}))
    assert read(path) == ([{"a": 1}, {"a": 2}], [1, 2])


def test_files_and_globs_in_order(tmp_path):
    write(tmp_path, "b.jsonl", lines({"n": 3}, {"n": 4}))
    write(tmp_path, "a.jsonl", lines({"n": 1}, {"n": 2}))
    last = write(tmp_path, "z.json", '[{"n": 5}]')
    write(tmp_path, "other.txt", "not read")
    (tmp_path / "c.jsonl").mkdir()
    rows = open_rows([str(tmp_path / "*.jsonl"), last], "data.train")
    assert [rows[index]["n"] for index in range(len(rows))] == [1, 2, 3, 4, 5]
    assert [str(rows.where(index)) for index in (0, 3, 4)] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/b.jsonl:2",
        f"{last}:1",
    ]
    assert [row["n"] for row in rows] == [1, 2, 3, 4, 5]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            rows[index]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    assert read(write(tmp_path, "a[1].jsonl", lines({"a": 1})))[0] == [{"a": 1}]


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "x.jsonl", lines({"a": 1}))
    rows = open_rows(["~/x.jsonl"], "data.train")
    assert rows[0] == {"a": 1} and str(rows.where(0)) == "~/x.jsonl:1"


def test_the_unpacked_copy_has_no_name(tmp_path, monkeypatch):
    """So nothing is left of it whatever becomes of the process."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = write(tmp_path, "a.jsonl.gz", lines({"a": 1}))
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    rows = open_rows([path, write(tmp_path, "b.jsonl.gz", lines({"a": 2}, {"a": 3}))], "data.train")
    assert not list(scratch.iterdir()) and [row["a"] for row in rows] == [1, 2, 3]
    write(tmp_path, "a.jsonl.gz", lines({"a": 4}))
    assert [row["a"] for row in rows] == [1, 2, 3]  # what was indexed and fingerprinted
    del rows
    gc.collect()
    assert not before or len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(UserError):
        open_rows([path, write(tmp_path, "c.jsonl.gz", b"")], "data.train")
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_many_files_need_few_descriptors(tmp_path, suffix):
    for number in range(300):
        write(tmp_path, f"{number:03d}.{suffix}", lines({"n": 2 * number}, {"n": 2 * number + 1}))
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
from sft_jax.data.sources.registry import open_rows
rows = open_rows([{str(tmp_path / f"*.{suffix}")!r}], "data.train")
order = [index * 7 % 600 for index in range(600)]
assert [rows[index]["n"] for index in order] == order
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})


def test_the_fingerprint_follows_the_bytes_and_the_order(tmp_path):
    one, two = write(tmp_path, "1.jsonl", lines({"a": 1})), write(tmp_path, "2.jsonl", lines({"a": 2}))
    same, packed = write(tmp_path, "3.jsonl", lines({"a": 1})), write(tmp_path, "4.jsonl.gz", lines({"a": 1}))
    array = write(tmp_path, "5.json", '[{"a": 1}]')

    def fingerprint(*paths):
        return open_rows(paths, "data.train").fingerprint

    assert fingerprint(one) == fingerprint(same) == fingerprint(packed)
    assert len({fingerprint(*paths) for paths in ((one,), (two,), (one, two), (two, one), (array,))}) == 5


def test_the_fingerprint_of_json_is_a_hash_of_the_bytes(tmp_path):
    """Prepared data are found by it, so it never changes. An array is told from lines of the same bytes."""
    paths = [write(tmp_path, "1.jsonl", lines({"a": 1})), write(tmp_path, "2.json", '[{"a": 2}]')]
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
    wanted = f"{digests[0]}\narray {digests[1]}\n"
    assert open_rows(paths, "data.train").fingerprint == hashlib.sha256(wanted.encode()).hexdigest()
    same = write(tmp_path, "2.jsonl", '[{"a": 2}]')
    assert open_rows([same], "data.train").fingerprint != open_rows(paths[1:], "data.train").fingerprint


def test_a_file_that_was_written_again_is_noticed_at_the_same_size(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({"a": 1}))
    rows = open_rows([path], "data.train")
    assert rows[0] == {"a": 1}
    os.utime(path, ns=(0, 0))  # as an editor that writes in place leaves it
    Path(path).write_text(lines({"a": 2}))
    with pytest.raises(UserError, match="has changed since it was first read"):
        rows[0]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="pipe.jsonl: is no regular file"):
        open_rows([str(tmp_path / "pipe.jsonl")], "data.train")


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstd)])
def test_an_archive_of_several_parts(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(pack(b'{"n": 1}\n{"n"') + pack(b"") + pack(b": 2}\n"))
    assert read(path)[0] == [{"n": 1}, {"n": 2}]
    path.write_bytes(pack(b""))
    with pytest.raises(UserError, match="is empty"):
        read(path)


def test_real_data_sets(assets):
    folder = assets / "datasets"
    for name in ("gsm8k/train.jsonl", "llamafactory_demo/v1_sft_demo.jsonl"):
        found, numbers = read(folder / name)
        assert found == [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        assert numbers == list(range(1, len(found) + 1))
    for name in ("fastchat/dummy_conversation.json", "llamafactory_demo/alpaca_en_demo.json"):
        found, numbers = read(folder / name)
        assert found == json.loads((folder / name).read_text(encoding="utf-8"))
        text = (folder / name).read_text(encoding="utf-8").split("\n")
        assert all(text[number - 1] == "  {" for number in numbers) and numbers == sorted(set(numbers))
    found, _ = read(folder / "sgd/sgd_messages.jsonl.gz")
    with gzip.open(folder / "sgd/sgd_messages.jsonl.gz", "rt", encoding="utf-8") as file:
        assert found == [json.loads(line) for line in file]


def test_rows_are_the_same_one_by_one_and_in_any_block(tmp_path):
    """Over the edges of files, of every kind, with rows that cannot be used."""
    first = write(tmp_path, "a.jsonl", b'{"n": 0}\n\n{"n": 1\n  {"n": 2}\r\n')
    second = write(tmp_path, "b.json", b'[{"n": 3},\n {"n": [4]} ]')
    third = write(tmp_path, "c.jsonl.gz", b'{"n": 5}\n{"n": "\xff"}\n{"n": 7}')
    rows = open_rows([first, second, third], "data.train")
    single = []
    for number in range(len(rows)):
        try:
            single.append(rows[number])
        except RowError as error:
            single.append(str(error))
    assert [row if isinstance(row, str) else row["n"] for row in single].count(7) == 1 and len(single) == 8
    for begin in range(9):
        for stop in range(begin, 9):
            block = [str(row) if isinstance(row, RowError) else row for row in rows.read(begin, stop)]
            assert block == single[begin:stop]
