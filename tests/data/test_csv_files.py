"""CSV and TSV as other readers see them, and a message for everything that can be wrong with them."""

import csv
import io
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import assert_rows_or_user_error, read, write

from sft_jax.data.examples import RowError
from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8) | st.sampled_from(
    ['"', '""', ",", "\n", "\r\n", "\t", "a\r\nb", "\x85", "\u2028", " ", "7"]
)
tables = st.integers(2, 4).flatmap(lambda width: st.lists(st.lists(texts, min_size=width, max_size=width), min_size=1, max_size=8))


@settings(max_examples=80, deadline=None)
@given(tables, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]), st.booleans())
def test_rows_are_those_of_another_reader(content, ending, bom, quoting, tabs):
    names = [f"n{number}" for number in range(len(content[0]))]
    if any("\r" in field for row in content for field in row):  # which Python's writer before 3.13 leaves without quotes
        quoting = csv.QUOTE_ALL
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if tabs else ",", lineterminator=ending, quoting=quoting)
    writer.writerow(names)
    writer.writerows(content)
    data = (b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode()
    with tempfile.TemporaryDirectory() as folder:
        found, lines = read(write(Path(folder), "rows.tsv" if tabs else "rows.csv", data))
    assert found == [dict(zip(names, row, strict=True)) for row in content]
    ends = [line for line, _ in zip(lines[1:], content, strict=False)]
    assert lines[0] == 2 and ends == [
        line + 1 + sum(field.count("\n") for field in row) for line, row in zip(lines, content[:-1], strict=False)
    ]
    if not any("\r" in field or "\n" in field for row in content for field in row):  # pyarrow's rules for these are its own
        options = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        table = pa.csv.read_csv(io.BytesIO(data), parse_options=pa.csv.ParseOptions(delimiter="\t" if tabs else ","), convert_options=options)
        assert table.to_pylist() == found


def test_blank_lines_are_no_rows_and_empty_fields_are_empty_text(tmp_path):
    path = write(tmp_path, "rows.csv", b'\n\na,b\n\n1,\n"",2\r\n\r\n,')
    assert read(path) == ([{"a": "1", "b": ""}, {"a": "", "b": "2"}, {"a": "", "b": ""}], [5, 6, 8])


def test_a_field_may_be_long(tmp_path):
    assert read(write(tmp_path, "rows.csv", "a\n" + "x" * 300_000 + "\n"))[0] == [{"a": "x" * 300_000}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1", "has 1 fields, but the header names 2; correct it: a field that holds a comma, a quote or a line break stands in double quotes."),
        (b"1,2,3", "has 3 fields, but the header names 2; correct it: a field that holds a comma, a quote or a line break stands in double quotes."),
        (b'1,"a"b', "is not valid CSV (',' expected after '\"'); a quote inside a quoted field is written twice."),
        (b"1,\xff", "is not UTF-8 (byte 3 of the row is 0xff); save it as UTF-8."),
        (b"1,\0", "holds a NUL character, which is no text; remove it."),
        (b"1,a\rb", "is not valid CSV (new-line character seen in unquoted field); a quote inside a quoted field is written twice."),
    ],
)  # fmt: skip
def test_a_bad_row_is_an_error_of_that_row_only(tmp_path, line, message):
    path = write(tmp_path, "rows.csv", b'a,b\n"x\ny",1\n\n' + line + b"\n3,4\n")
    rows = open_rows([path], "data.train")
    assert len(rows) == 3 and rows[0] == {"a": "x\ny", "b": "1"} and rows[2] == {"a": "3", "b": "4"}
    assert str(rows.where(1)) == f"{path}:5"
    with pytest.raises(RowError) as caught:
        rows[1]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n", ": holds no rows; leave it out, or write it again."),
        ("a.csv", b"a,a\n1,2", ":1: the header has the field 'a' twice; names must differ."),
        ("a.csv", b"\na,\n1,2", ":2: the header has a field without a name; the first line names every field."),
        ("a.csv", b"a\xff,b\n1,2", ":1: the header is not UTF-8 (byte 2 of the row is 0xff); save it as UTF-8."),
        ("a.csv", b"a;b\n1;2", ":1: the header is one field, 'a;b'; fields are separated by ',' in this kind of file, not by ';'."),
        ("a.tsv", b"a,b\n1,2", ":1: the header is one field, 'a,b'; fields are separated by '\\t' in this kind of file, not by ','."),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', ":3: a double quote in this row is never closed, so the rest of the file is in it; correct the row."),
        ("a.csv", "a,b\n1,2".encode("utf-16"), ": is in UTF-16; save it as UTF-8."),
    ],
)  # fmt: skip
def test_files_that_are_no_csv(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        open_rows([path], "data.train")
    assert str(caught.value) == f"data.train: {path}{message}"


def test_the_same_bytes_as_csv_and_tsv_are_other_data(tmp_path):
    names = [write(tmp_path, f"a.{kind}", b"a\n1\n") for kind in ("csv", "tsv")]
    assert len({open_rows([name], "data.train").fingerprint for name in names}) == 2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([b'"', b",", b"a", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b" "]), max_size=14))
def test_any_file_is_rows_or_a_user_error(content):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "x.csv", b"".join(content))
        assert_rows_or_user_error(path, lambda row: all(isinstance(value, str) for value in row.values()))
