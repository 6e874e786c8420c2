"""Remote files are copied once, and again when they change; what goes wrong on the way is one message."""

import os

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError


@pytest.fixture
def bucket(tmp_path):
    """Returns a function that writes a file of the bucket `memory://NAME/` and returns its URL."""
    system, root = fsspec.filesystem("memory"), f"/bucket{tmp_path.name}"

    def write(name, data):
        system.pipe_file(f"{root}/{name}", data)
        return f"memory://{root}/{name}"

    write.url = f"memory://{root}"
    yield write
    system.rm(root, recursive=True)


@pytest.fixture
def rows_of(tmp_path):
    def rows_of(*names):
        rows_of.lines = []
        return open_rows(names, "data.train", tmp_path / "cache", rows_of.lines.append)

    return rows_of


def test_a_file_is_copied_once_and_again_when_it_changes(bucket, rows_of, tmp_path):
    url = bucket("a.jsonl", b'{"n": 1}\n')
    first = rows_of(url)
    assert list(first) == [{"n": 1}] and str(first.where(0)) == f"{url}:1" and first.names == (url,)
    (copy,) = (tmp_path / "cache").rglob("*.jsonl")
    assert rows_of.lines == [f"data.train: {url}: copying 9 bytes to {copy}."]
    again = rows_of(url)
    assert not rows_of.lines and again.fingerprint == first.fingerprint
    bucket("a.jsonl", b'{"n": 2}\n')  # as many bytes
    changed = rows_of(url)
    assert len(rows_of.lines) == 1 and list(changed) == [{"n": 2}] and changed.fingerprint != first.fingerprint
    assert list(first) == [{"n": 1}]  # what was opened is what is read


def test_a_copy_that_is_cut_is_made_again(bucket, rows_of, tmp_path):
    """As a machine leaves it that went down while it was written."""
    url = bucket("a.jsonl", b'{"n": 1}\n{"n": 2}\n')
    rows_of(url)
    (copy,) = (tmp_path / "cache").rglob("*.jsonl")
    os.truncate(copy, 9)
    assert list(rows_of(url)) == [{"n": 1}, {"n": 2}] and len(rows_of.lines) == 1


def test_a_remote_file_is_the_same_data_as_a_local_one(bucket, rows_of, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n')
    assert rows_of(bucket("b.jsonl", b'{"n": 1}\n')).fingerprint == rows_of(str(tmp_path / "a.jsonl")).fingerprint


def test_globs_and_every_kind_of_file(bucket, rows_of):
    table = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({"n": [3]}), table)
    bucket("b.csv", b"n\n2\n")
    bucket("a.jsonl", b'{"n": 1}\n')
    bucket("c.parquet", table.getvalue().to_pybytes())
    bucket("folder/d.jsonl", b'{"n": 4}\n')
    assert [row["n"] for row in rows_of(f"{bucket.url}/*.*")] == [1, "2", 3]
    assert [row["n"] for row in rows_of(f"{bucket.url}/**/*.jsonl")] == [1, 4]


def test_a_store_that_tells_no_versions_is_copied_every_time(bucket, rows_of, monkeypatch):
    url = bucket("a.jsonl", b'{"n": 1}\n')
    real = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {**real(self, path), "created": None})
    for _ in range(2):
        assert list(rows_of(url)) == [{"n": 1}] and len(rows_of.lines) == 1


def test_a_local_url_is_the_file(rows_of, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n')
    assert list(rows_of(f"file://{tmp_path}/a.jsonl")) == [{"n": 1}] and not rows_of.lines
    assert not (tmp_path / "cache").exists()


def refused(rows_of, name, message):
    with pytest.raises(UserError) as caught:
        rows_of(name)
    assert str(caught.value) == f"data.train: {name}{message}"


def test_urls_that_name_no_file(bucket, rows_of):
    bucket("folder/a.jsonl", b"{}\n")
    refused(rows_of, f"{bucket.url}/b.jsonl", ": there is no such file; check the URL.")
    refused(rows_of, f"{bucket.url}/*.csv", ": matches no file; check the URL and the pattern.")
    refused(rows_of, f"{bucket.url}/folder", f": is a directory; name a file or a glob such as {bucket.url}/folder/*.jsonl.")
    refused(rows_of, bucket("a.jsonl", b""), ": is empty; leave it out, or write it again.")
    with pytest.raises(UserError, match="is no kind of file that is read here"):
        rows_of(bucket("a.txt", b"a"))
    url = bucket("b.jsonl", b"{}\n")
    with pytest.raises(UserError, match="is the same file as .*; name it once"):
        rows_of(url, f"{bucket.url}/b*")


def test_a_package_that_is_missing(rows_of, monkeypatch):
    def missing(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    refused(rows_of, "gs://bucket/a.jsonl", ": a package for such URLs is missing (pip install gcsfs).")
    refused(rows_of, "s3://bucket/a.jsonl", ": a package for such URLs is missing (pip install s3fs).")
    refused(rows_of, "abfs://bucket/a.jsonl", ": a package for such URLs is missing (Please install gcsfs to access Google Storage).")


def test_a_scheme_that_nothing_reads(rows_of):
    refused(
        rows_of, "nothing://bucket/a.jsonl", ": is no URL that is read here (Protocol not known: nothing); copy the data to a local disk."
    )  # fmt: skip


@pytest.mark.parametrize("call", ["info", "get_file"])
def test_a_store_that_cannot_be_reached(bucket, rows_of, monkeypatch, call, tmp_path):
    url = bucket("a.jsonl", b"{}\n")

    def fail(*args, **kwargs):
        raise RuntimeError("no credentials\nin 3 places")

    monkeypatch.setattr(MemoryFileSystem, call, fail)
    refused(
        rows_of, url,
        ": cannot be read from there (RuntimeError: no credentials); check the URL, the network and your credentials, or copy the data "
        "to a local disk.",
    )  # fmt: skip
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_pattern_in_a_store_that_cannot_be_reached(bucket, rows_of, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Forbidden")

    bucket("a.jsonl", b"{}\n")
    monkeypatch.setattr(MemoryFileSystem, "glob", fail)
    refused(
        rows_of, f"{bucket.url}/*.jsonl",
        ": cannot be read from there (PermissionError: [Errno 13] Forbidden); check the URL, the network and your credentials, or copy the "
        "data to a local disk.",
    )  # fmt: skip


def test_a_copy_that_is_cut_short(bucket, rows_of, monkeypatch, tmp_path):
    url = bucket("a.jsonl", b'{"n": 1}\n')
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, path, target, **_: open(target, "wb").write(b"{") and None)
    refused(rows_of, url, ": 1 of 9 bytes were copied; start again.")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_folder_that_cannot_hold_copies(bucket, rows_of, tmp_path):
    url = bucket("a.jsonl", b"{}\n")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=f"cache/remote/.*: cannot hold a copy of {url} .*; free space there, or set data.cache_dir"):
        rows_of(url)
