"""What holds for rows of every kind of data."""

import os
import pickle
import random
from pathlib import Path

import pytest
from row_kinds import BINARY, KINDS, LINES

from sft_jax.data.examples import RowError
from sft_jax.data.sources import parts
from sft_jax.data.sources.pieces import OPEN_FILES
from sft_jax.data.sources.registry import PACKED, READERS, SETS, open_rows
from sft_jax.errors import UserError

TEXTS = ["plain", "", 'a "quoted" word', "two\nlines", "a,b\tc;d", "ä 漢 🙂", " spaces ", "\\n", "a\r\nb", "#", "null", "007"]
ROWS = [{"prompt": f"{number} {TEXTS[number % len(TEXTS)]}", "completion": TEXTS[number * 5 % len(TEXTS)]} for number in range(300)]


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def make(kind, tmp_path, monkeypatch):
    """Returns a function that writes rows into a new folder and returns their name."""
    folders = []

    def write(rows, name=None):
        folder = tmp_path / (name or f"folder{len(folders)}")
        folder.mkdir()
        folders.append(folder)
        monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
        return KINDS[kind](folder, rows)

    write.open = lambda *names: open_rows(names, "data.train", tmp_path / "cache", lambda line: None)
    return write


def test_every_reader_is_in_these_tests():
    names = {f".{name.partition('.')[0]}" for name in KINDS} | {f"{name}:" for name in KINDS}
    assert set(READERS) | set(SETS) <= names and set(READERS) >= PACKED


def test_the_same_rows_come_back_in_any_order(kind, make):
    rows = make.open(make(ROWS))
    assert len(rows) == len(ROWS) and list(rows) == ROWS
    generator = random.Random(1)
    for number in generator.sample(range(len(ROWS)), 40):
        assert rows[number] == ROWS[number]
    for _ in range(20):
        first, stop = sorted(generator.sample(range(len(ROWS) + 1), 2))
        assert rows.read(first, stop) == ROWS[first:stop]
    with pytest.raises(IndexError):
        rows[len(ROWS)]


def test_rows_that_another_process_reads_are_the_same(kind, make):
    sent = pickle.loads(pickle.dumps(make.open(make(ROWS)).unparsed(0, len(ROWS))))
    assert [row.read() if isinstance(row, parts.Unparsed) else row for row in sent] == ROWS


def test_where_is_the_line_or_the_number_of_the_row(kind, make):
    name = make(ROWS)
    rows = make.open(name)
    places = [rows.where(number) for number in range(len(ROWS))]
    assert {place.file for place in places} == set(rows.names) and all(name in place.file for place in places)
    if kind in LINES and kind != "memory":
        text = Path(name).read_bytes().decode().split("\n")
        for number in range(len(ROWS)):
            begins = {"json": " {", "csv": f'"{number} ', "tsv": f'"{number} '}.get(kind, f'{{"prompt": "{number} ')
            line = text[places[number].line - 1]
            assert line.startswith((begins, begins.replace('"', "") if kind in ("csv", "tsv") else begins)), line
    elif kind == "hf":
        assert [place.line for place in places] == [*range(1, 151), *range(1, 151)]
    elif not kind.startswith("csv"):
        assert [place.line for place in places] == list(range(1, len(ROWS) + 1))


def test_the_fingerprint_follows_the_rows_and_nothing_else(kind, make):
    first, again = make.open(make(ROWS)).fingerprint, make.open(make(ROWS, "elsewhere")).fingerprint
    changed = [*ROWS[:-1], {**ROWS[-1], "completion": "another"}]
    assert first == again
    assert make.open(make(changed)).fingerprint != first
    assert make.open(make(ROWS[:-1])).fingerprint != first


def test_kinds_are_mixed(make, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"n": 1}\n')
    rows = make.open(str(other), make(ROWS[:100]))
    assert rows.read(0, 101) == [{"n": 1}, *ROWS[:100]] and rows[100] == ROWS[99]


def test_few_files_are_open(kind, make):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("open files are not counted here")
    names = [make(ROWS[:3]) for _ in range(3 if kind == "tfds" else 60)]
    before = len(os.listdir("/proc/self/fd"))
    rows = make.open(*dict.fromkeys(names))
    for number in random.Random(1).sample(range(len(rows)), len(rows)):
        assert rows[number] == ROWS[number % 3]
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES + 1


def test_what_is_kept_of_files_is_bounded(make, monkeypatch):
    monkeypatch.setattr(parts, "CACHED_BYTES", 1)
    rows = make.open(make(ROWS))
    for number in random.Random(1).sample(range(len(ROWS)), 50):
        assert rows[number] == ROWS[number]


def files_of(name):
    folder = name.removeprefix("hf:") if name.startswith("hf:") else os.environ["TFDS_DATA_DIR"]
    if os.path.isfile(name):
        return [Path(name)]
    return sorted(path for path in Path(folder).rglob("*") if ".arrow" in path.name or ".array_record" in path.name)


@pytest.mark.parametrize("kind", BINARY, indirect=True)
@pytest.mark.parametrize("keep", [0.97, 0.5, 0.1, "junk", "flipped"])
def test_a_damaged_file_is_named(kind, make, keep):
    name = make(ROWS)
    path = max(files_of(name), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    if keep == "junk":
        path.write_bytes(b"no such file at all\n" * 40)
    elif keep == "flipped":
        half = len(data) // 2
        path.write_bytes(data[:half] + bytes(byte ^ 0xFF for byte in data[half : half + 40]) + data[half + 40 :])
    else:
        path.write_bytes(data[: int(len(data) * keep)])
    try:
        rows = list(make.open(name).read(0, len(ROWS)))
    except UserError as error:
        assert name in str(error) and any(word in str(error) for word in ("copy it again", "prepare the data set again"))
        return
    # Without checksums a change of values cannot be noticed; it is another data set then.
    assert keep == "flipped" and kind in ("parquet", "arrow", "hf", "feather") and rows != ROWS


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in ("tfds", "hf", "memory")], indirect=True)
def test_an_empty_file_is_named(kind, make):
    name = make(ROWS)
    Path(name).write_bytes(b"")
    with pytest.raises(UserError, match="empty|is not a whole") as caught:
        make.open(name)
    assert f"data.train: {name}: " in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "parquet", "feather", "arrow", "array_record", "hf", "tfds"], indirect=True)
def test_a_file_that_changes_while_it_is_used(kind, make):
    name = make(ROWS)
    rows = make.open(name)
    for path in files_of(name):
        path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match="has changed since it was first read; start again"):
        rows[0]
    for path in files_of(name):
        path.unlink()
    with pytest.raises(UserError, match="can no longer be read"):
        rows[0]


@pytest.mark.parametrize("kind", [name for name in BINARY if name not in ("hf", "tfds")], indirect=True)
def test_any_bytes_are_rows_or_errors_that_are_told(kind, make):
    name = make(ROWS)
    data, generator = Path(name).read_bytes(), random.Random(1)
    used = [place for place, byte in enumerate(data) if byte]  # an ArrayRecord file is mostly zeros
    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.sample(used, generator.choice([1, 2, 8])):
            damaged[place] = generator.randrange(256)
        Path(name).write_bytes(damaged)
        try:
            rows = make.open(name)
            found = rows.read(0, len(rows))
        except UserError as error:
            assert name in str(error)
        else:
            assert all(isinstance(row, (dict, RowError)) for row in found)


def test_an_error_of_a_row_is_of_that_row_only(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,2\n3\n"\xff",4\n5,6\n')
    rows = open_rows([str(path)], "data.train")
    assert [isinstance(row, RowError) for row in rows.read(0, 4)] == [False, True, True, False]


@pytest.mark.parametrize("kind", ["parquet", "array_record"], indirect=True)
def test_a_file_of_as_many_bytes_with_other_rows(kind, make):
    """It is replaced before it is read, with the same size and time."""
    name, fewer = make(ROWS), make(ROWS[:200])
    rows, state, data = make.open(name), os.stat(name), Path(fewer).read_bytes()
    if kind == "parquet":  # whose footer is at the end; an ArrayRecord file is filled up to 64 KB
        data = b"PAR1" + b"\0" * (state.st_size - len(data)) + data[4:]
    assert len(data) == state.st_size
    Path(name).write_bytes(data)
    os.utime(name, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(UserError, match="has changed since|is damaged"):
        rows.read(0, len(ROWS))
