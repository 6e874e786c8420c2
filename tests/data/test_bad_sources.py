"""One message for everything that can be wrong with a file or a row."""

import json
import os
import pickle
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import assert_rows_or_user_error, lines, write
from row_kinds import zstd

from sft_jax.config import ColumnsConfig
from sft_jax.data.examples import RowError
from sft_jax.data.formats.detection import detect_format
from sft_jax.data.sources import pieces
from sft_jax.data.sources.json_rows import parse_row
from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not valid JSON.*column 8.*correct or remove"),
        (b"{'a': 1}", "not valid JSON.*column 2"),
        (b"[1, 2]", "is a list, not an object"),
        (b'"text"', "is text, not an object"),
        (b"null", "is null, not an object"),
        (b"7", "is a number, not an object"),
        (b'{"a": "\xff"}', "is not UTF-8 .byte 8 of the row is 0xff"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"a": ' + b"[" * 120 + b"]" * 120 + b"}", "in more than 100 others"),
        (b'{"a": 1, "b": 2, "a": 1}', "has the key 'a' twice"),
        (b'{"m": [{"role": "user", "content": "x", "content": "y"}]}', "has the key 'content' twice"),
    ],
)
def test_a_malformed_row_is_an_error_of_that_row_only(tmp_path, line, message):
    path = write(tmp_path, "rows.jsonl", b'{"n": 1}\n\n' + line + b'\n{"n": 2}\n')
    rows = open_rows([path], "data.train")
    assert rows[0] == {"n": 1} and rows[2] == {"n": 2}
    assert str(rows.where(1)) == f"{path}:3"
    with pytest.raises(RowError, match=message):
        rows[1]


HOSTILE = {
    ".jsonl": [
        json.dumps(dict.fromkeys(map(str, range(100_000)), 1)).encode()[:-1] + b', "99999": 2}',  # a key that comes twice
        json.dumps(dict.fromkeys(map(str, range(100_000)), 1)).encode(),
        json.dumps({"k" * 10**6: 1}).encode(),
        b"[" * 3_000_000,
        b"\n" * 3_000_000 + b"[]",
    ],
    ".json": [b" " * 60_000_000, b" " * 2_000_000 + b"[{}," + b" " * 2_000_000 + b"{}]", b"[" + b"{}," * 100_000 + b"{}]", b"[" * 3_000_000],
    ".csv": [
        b",".join(b"%d" % number for number in range(100_000)) + b"\n1",
        b",".join(b"%d" % number for number in range(100_000)) + b",7\n1",
        b"n" * 10**6 + b"\n1,2",
        b'text\n"' + b"a\n" * 500_000,
        b"text\n" + b'"a"b"\n' * 50_000,
    ],
}


@pytest.mark.parametrize("suffix", HOSTILE)
def test_hostile_files_take_time_in_step_with_their_size(tmp_path, suffix):
    """The command itself reads files, and nothing watches it. What grows with the square of the size takes minutes here."""
    for number, data in enumerate(HOSTILE[suffix]):
        path = write(tmp_path, f"{number}{suffix}", data)
        begun = time.process_time()
        with pytest.raises(UserError) as error:
            rows = open_rows([path], "data.train")
            detect_format(rows, ColumnsConfig())
        assert time.process_time() - begun < 20, data[:40]
        assert path in str(error.value) and len(str(error.value)) < 8000


def test_rows_as_deep_as_is_allowed_can_be_sent_to_a_worker():
    deep = b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}"
    assert pickle.loads(pickle.dumps(parse_row(deep))) == json.loads(deep)
    with pytest.raises(RowError):
        parse_row(deep.replace(b"[]", b"[[]]"))
    wide = {"a": [[{}]] * 500}
    assert parse_row(json.dumps(wide).encode()) == wide


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_row_or_an_error_of_the_row(data):
    try:
        assert isinstance(parse_row(data), dict)
    except RowError:
        pass


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"[", b"]", b"{", b"}", b'"a"', b":", b",", b"1", b"\n", b" ", b"\xff", b"\xef\xbb\xbf"]),
        max_size=12,
    ),
    st.sampled_from([".json", ".jsonl", ".json.gz", ".jsonl.gz"]),
)
def test_any_file_is_rows_or_a_user_error(parts, suffix):
    with tempfile.TemporaryDirectory() as folder:
        assert_rows_or_user_error(write(Path(folder), f"x{suffix}", b"".join(parts)), lambda row: isinstance(row, dict))


def refused(paths, message):
    with pytest.raises(UserError, match=message) as caught:
        open_rows([str(path) for path in paths], "data.train")
    assert str(caught.value).startswith("data.train: ")


def test_paths_that_name_no_file(tmp_path):
    refused([tmp_path / "no.jsonl"], "no.jsonl: there is no such file")
    refused(["openai/gsm8k"], "openai/gsm8k: there is no such file; check the path. A data set .* is written hf:openai/gsm8k:train.$")
    refused([tmp_path / "*.jsonl"], "matches no file")
    refused([tmp_path], "is a directory; name a file or a glob")
    refused([], "names no file")
    refused([write(tmp_path, "rows.txt", "a,b")], "no kind of file.*jsonl.*those of text also with .gz, .zst")
    refused([write(tmp_path, "rows.parquet.gz", "a,b")], "files of kind .parquet are not read packed; unpack it first")
    path = write(tmp_path, "a.jsonl", lines({"a": 1}))
    refused([path, tmp_path / "*.jsonl"], "is the same file as")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl.gz", b"", "is empty"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.json", b" [ ] ", "holds no rows"),
        ("a.json", b'[{"a": 1},\n {"b" 2}]', r"a.json:2: is not valid JSON \(Expecting ':' delimiter\)"),
        ("a.json", b'[{"a": 1},\n', "the file ends|Expecting value"),
        ("a.json", b'[{"a": 1}\n', r"a.json:2.*ends inside the array"),
        ("a.json", b'[{"a": 1}] x', "Extra data"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        (
            "a.json",
            b'{\n "data": [\n  {"a": 1}\n ]\n}',
            "one JSON dict, not an array of rows .its field 'data' is a list",
        ),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16; save it as UTF-8"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, content, message):
    refused([write(tmp_path, name, content)], message)


def test_a_damaged_gz(tmp_path):
    path = write(tmp_path, "a.jsonl.gz", lines(*({"a": os.urandom(50).hex()} for _ in range(100))))
    data = Path(path).read_bytes()
    for damaged in (data[:-20], b"plain text", data[:200] + b"\x00" * 50 + data[250:]):
        Path(path).write_bytes(damaged)
        refused([path], "is not a whole gzip file")


def test_a_damaged_zst(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    data = zstd(lines(*({"a": os.urandom(50).hex()} for _ in range(100))).encode())
    for damaged, reason in (
        (data[:-20], "Truncated compressed stream"),
        (b"plain text", "ZSTD decompress failed: Unknown frame descriptor"),
        (data + b"more", "ZSTD decompress failed: Unknown frame descriptor"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            open_rows([str(path)], "data.train")
        assert str(caught.value) == f"data.train: {path}: is not a whole zstd file ({reason}); copy it again."


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell what is in use")
def test_damaged_archives_leave_nothing_in_memory(tmp_path):
    path = write(tmp_path, "a.jsonl.zst", zstd(lines(*({"a": os.urandom(50).hex()} for _ in range(100))).encode())[:-20])
    used = []
    for _ in range(40):
        with pytest.raises(UserError, match="is not a whole zstd file"):
            open_rows([path], "data.train")
        used.append(int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE") >> 20)
    assert used[-1] - used[5] < 100


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", lines({"a": 1}))
    real = os.open

    def refuse(file, *args, **kwargs):
        if str(file) == path:
            raise PermissionError(13, "Permission denied", path)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    refused([path], "cannot be read .Permission denied.")


def test_a_disk_too_full_to_unpack(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl.gz", lines({"a": 1}))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    real = pieces._write
    monkeypatch.setattr(pieces, "_write", lambda file, block: real(_Full(), block))
    with pytest.raises(UserError, match="cannot hold an unpacked data file .No space left on device.*TMPDIR"):
        open_rows([path], "data.train")
    assert not list(scratch.iterdir())


class _Full:
    def write(self, block):
        raise OSError(28, "No space left on device")


def test_a_file_that_changes_while_it_is_used(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({"a": 1}))
    rows = open_rows([path], "data.train")
    write(tmp_path, "a.jsonl", lines({"a": 1}, {"a": 2}))
    with pytest.raises(UserError, match="has changed since"):
        rows[0]
    os.unlink(path)
    with pytest.raises(UserError, match="can no longer be read"):
        rows[0]
