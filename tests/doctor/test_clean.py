"""The cleaned copy of --fix: what is kept, what went and why."""

import base64
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
from doctor_data import configure, faulty, row, rows, sentence, visit
from row_files import lines, write

from sft_jax.data.sources.registry import open_rows
from sft_jax.doctor.check import diagnose
from sft_jax.doctor.checks import CHECKS


def test_the_cleaned_copy_keeps_the_bytes_of_rows_and_says_what_went(tmp_path):
    held = rows(5, 200)
    content = (
        b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\r\n\n"
        + b'{"completion":  "' + sentence(1).encode() + b'", "prompt": "\xc3\xa4 and what else is there?", "extra": 1.50}\n'
        + lines(row(2), row(3), row(2), row(4, completion=" "), held[1]).encode()
        + b"{broken\n" + json.dumps(row(5)).encode()
    )  # fmt: skip
    config = configure(tmp_path, rows(1), held)
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    log = []
    code, _ = visit(config, fix=str(tmp_path / "out"), log=log.append)
    assert code == 3 and path.read_bytes() == content
    source = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert (tmp_path / "out/train/train.jsonl").read_bytes() == b"".join(source[place] + b"\n" for place in (0, 2, 3, 4, 9))
    assert (tmp_path / "out/eval/eval.jsonl").read_bytes() == (tmp_path / "eval.jsonl").read_bytes()
    removed = [json.loads(line) for line in (tmp_path / "out/removed.jsonl").read_text().splitlines()]
    assert [(each["file"], each["line"], each["kind"], each["also"]) for each in removed] == [
        (str(path), 6, "duplicate", []), (str(path), 7, "empty_answer", []), (str(path), 8, "overlap", []),
        (str(path), 9, "unreadable", []),
    ]  # fmt: skip
    assert removed[0]["row"] == row(2) and removed[0]["detail"] == f"is the same as {path}:4" and removed[3]["row"] == "{broken"
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["removed_by_kind"] == {"unreadable": 1, "empty_answer": 1, "duplicate": 1, "overlap": 1}
    assert (summary["kept"], summary["removed"]) == (10, 4)
    assert summary["kinds"] == ["unreadable", "empty_answer", "duplicate", "overlap", "near_duplicate"]
    assert log[-1] == f"{tmp_path / 'out'}: 10 of 14 rows; removed.jsonl says why the others went."
    assert sorted(each.name for each in tmp_path.iterdir()) == ["eval.jsonl", "out", "train.jsonl"]


def test_the_cleaned_copy_is_clean_of_what_was_removed(tmp_path):
    config = configure(tmp_path, faulty(), rows(5, 200))
    visit(config, fix=str(tmp_path / "out"), fix_kinds=list(CHECKS))
    again = configure(tmp_path, rows(1))
    path = tmp_path / "train.jsonl"
    path.write_bytes((tmp_path / "out/train/train.jsonl").read_bytes())
    diagnosis = diagnose(again.data)
    assert [kind for kind, result in diagnosis.kinds.items() if result.rows] == [] and diagnosis.rows == 30


def test_only_named_kinds_are_removed(tmp_path):
    visit(configure(tmp_path, faulty()), fix=str(tmp_path / "out"), fix_kinds=["refusal"])
    removed = [json.loads(line) for line in (tmp_path / "out/removed.jsonl").read_text().splitlines()]
    assert [(each["line"], each["kind"]) for each in removed] == [(34, "refusal")]


def test_arrays_packed_files_and_files_of_one_name_are_copied(tmp_path):
    (tmp_path / "other").mkdir()
    array = write(tmp_path, "rows.json", json.dumps([row(1), row(1), row(2)], indent=1))
    packed = write(tmp_path, "more.jsonl.gz", lines(row(3), row(3), row(4)))
    same_name = write(tmp_path / "other", "rows.json", lines(row(5), row(6)))
    empty = write(tmp_path, "empty.jsonl", lines(row(1), row(2)))
    config = configure(tmp_path, rows(1), train=[array, packed, same_name, empty])
    visit(config, fix=str(tmp_path / "deep/out"))
    folder = tmp_path / "deep/out/train"
    read = {each.name: [json.loads(line) for line in each.read_text().splitlines()] for each in folder.iterdir()}
    assert read == {"rows.jsonl": [row(1), row(2)], "more.jsonl": [row(3), row(4)], "rows-2.jsonl": [row(5), row(6)]}
    assert gzip.open(packed).read() == lines(row(3), row(3), row(4)).encode()
    files = json.loads((tmp_path / "deep/out/summary.json").read_text())["files"]
    assert [(each["copy"], each["kept"], each["removed"]) for each in files] == [
        ("train/rows.jsonl", 2, 1), ("train/more.jsonl", 2, 1), ("train/rows-2.jsonl", 2, 0), (None, 0, 2),
    ]  # fmt: skip
    assert len(open_rows([str(folder / "*.jsonl")], "data.train")) == 6


def test_an_empty_folder_takes_the_copy(tmp_path):
    (tmp_path / "out").mkdir()
    visit(configure(tmp_path, rows(5)), fix=str(tmp_path / "out"))
    assert (tmp_path / "out/train/train.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()


def test_rows_that_differ_where_no_answer_is_are_kept(tmp_path):
    def chat(system, reasoning):
        turns = [{"role": "system", "content": system}] * bool(system)
        turns.append({"role": "user", "content": sentence("question", 20)})
        return {"messages": [*turns, {"role": "assistant", "content": sentence("answer", 60), "reasoning_content": reasoning}]}

    first, second = sentence("one way", 60), sentence("another way", 60)
    train = [chat("", first), chat("", second), chat(sentence("system", 40), first), chat("", first)]
    train += [{**chat("", first), "tools": [{"name": "clock", "description": sentence("clock", 30)}]}]
    visit(configure(tmp_path, train), fix=str(tmp_path / "out"))
    copy = (tmp_path / "out/train/train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in copy] == [train[at] for at in (0, 1, 2, 4)]


def test_short_rows_that_differ_where_no_answer_is_are_kept(tmp_path):
    train = [{"prompt": "How are you?", "completion": "Fine.", "system": system} for system in ("Be short.", "Be kind.", "Be kind!")]
    visit(configure(tmp_path, train, columns={"system": "system"}), fix=str(tmp_path / "out"))
    copy = (tmp_path / "out/train/train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in copy] == train[:2]


def test_what_json_cannot_hold_is_written_as_near_as_can_be_and_counted(tmp_path):
    table = pa.Table.from_pylist(
        [{**row(number), "picture": b"\x00\xff", "score": float("nan") if number else 0.5, "when": None} for number in range(3)]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    visit(configure(tmp_path, rows(1), train=str(tmp_path / "rows.parquet")), fix=str(tmp_path / "out"))
    copy = [json.loads(line) for line in (tmp_path / "out/train/rows.jsonl").read_text().splitlines()]
    picture = base64.b64encode(b"\x00\xff").decode()
    assert copy == [{**row(at), "picture": picture, "score": None if at else 0.5, "when": None} for at in range(3)]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["columns_changed"] == {"picture": 3, "score": 2}


def test_lines_of_a_zstd_archive_keep_their_bytes(tmp_path):
    content = b'{"prompt":  "What is this?", "completion": "' + sentence(1).encode() + b'"}\n' + lines(row(2), row(2)).encode()
    path = tmp_path / "rows.jsonl.zst"
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    visit(configure(tmp_path, rows(1), train=str(path)), fix=str(tmp_path / "out"))
    assert (tmp_path / "out/train/rows.jsonl").read_bytes() == b"".join(content.splitlines(keepends=True)[:2])
