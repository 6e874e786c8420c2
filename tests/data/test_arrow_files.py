"""Parquet and Arrow: values as plain Python, and a message for everything that can be wrong with the files."""

import datetime
import decimal
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_kinds import write_stream

from sft_jax.config import ColumnsConfig
from sft_jax.data.examples import RowError
from sft_jax.data.formats.detection import detect_format
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=5)
leaves = st.sampled_from(
    [
        (pa.string(), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), (pa.large_string(), st.just("long")),
        (pa.int64(), st.integers(-(2**63), 2**63 - 1)), (pa.float64(), st.floats(allow_nan=False)), (pa.bool_(), st.booleans()),
        (pa.null(), st.none()), (pa.binary(), st.text(max_size=4).map(lambda text: text.encode("utf-8", "replace").decode())),
    ]
)  # fmt: skip


def struct(fields):
    kinds = [(name, kind) for name, (kind, _) in fields.items()]
    return pa.struct(kinds), st.fixed_dictionaries({name: st.none() | values for name, (_, values) in fields.items()})


kinds = st.recursive(
    leaves,
    lambda inner: inner.map(lambda each: (pa.list_(each[0]), st.lists(st.none() | each[1], max_size=3)))
    | st.dictionaries(names, inner, min_size=1, max_size=3).map(struct),
    max_leaves=5,
)


def encoded(value, kind):
    """Returns a value as pyarrow is given it: bytes for a binary column."""
    if value is None:
        return None
    if isinstance(kind, pa.StructType):
        return {field.name: encoded(value[field.name], field.type) for field in kind}
    if isinstance(kind, pa.ListType):
        return [encoded(item, kind.value_type) for item in value]
    return value.encode() if pa.types.is_binary(kind) else value


def without_nulls(value):
    """Fields of structs that are null are absent; null columns and items of lists stay."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None)
@given(st.data(), st.dictionaries(names, kinds, min_size=1, max_size=3))
def test_random_rows_come_back_equal(data, fields):
    kind, values = struct(fields)
    content = data.draw(st.lists(values, min_size=1, max_size=6))
    table = pa.Table.from_pylist([encoded(row, kind) for row in content], schema=pa.schema(list(kind)))
    with tempfile.TemporaryDirectory() as folder:
        pa.parquet.write_table(table, f"{folder}/rows.parquet", row_group_size=2)
        pa.feather.write_feather(table, f"{folder}/rows.feather", chunksize=2, compression="uncompressed")
        with pa.OSFile(f"{folder}/rows.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        for name in ("rows.parquet", "rows.feather", "rows.arrow"):
            assert list(open_rows([f"{folder}/{name}"], "data.train")) == [
                {column: without_nulls(value) for column, value in row.items()} for row in content
            ]


def parquet(folder, columns, name="rows.parquet"):
    pa.parquet.write_table(pa.table(columns), folder / name)
    return open_rows([str(folder / name)], "data.train")


def test_what_json_has_no_word_for(tmp_path):
    moment = datetime.datetime(2024, 1, 31, 12)
    row = parquet(
        tmp_path,
        {
            "moment": pa.array([moment], pa.timestamp("ms")), "zoned": pa.array([moment], pa.timestamp("s", "UTC")),
            "moments": pa.array([[moment, None]], pa.list_(pa.timestamp("us"))), "date": pa.array([moment.date()]),
            "time": pa.array([moment.time()]), "span": pa.array([datetime.timedelta(seconds=5)], pa.duration("ms")),
            "price": pa.array([decimal.Decimal("1.20")]), "bytes": pa.array(["ä".encode()]), "small": pa.array([7], pa.uint8()),
            "map": pa.array([[("a", 1), ("b", None)]], pa.map_(pa.string(), pa.int64())),
            "numbered": pa.array([[(1, "x")]], pa.map_(pa.int32(), pa.string())), "half": pa.array([0.5], pa.float32()),
            "kind": pa.array(["x"]).dictionary_encode(), "json": pa.array(['{"a": [1, null]}'], pa.json_()),
        },
    )[0]  # fmt: skip
    assert row == {
        "moment": "2024-01-31 12:00:00.000", "zoned": "2024-01-31 12:00:00.000Z", "moments": ["2024-01-31 12:00:00.000000", None],
        "date": "2024-01-31", "time": "12:00:00.000000", "span": 5000, "price": "1.20", "bytes": "ä", "small": 7,
        "map": {"a": 1, "b": None}, "numbered": {"1": "x"}, "half": 0.5, "kind": "x", "json": {"a": [1, None]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64())), "column 'c': a map has the same key twice; keep one of them."),
        (pa.array([[(0.5, 1)], []], pa.map_(pa.float64(), pa.int64())), "column 'c': a map has the key 0.5, which is neither text nor a whole number; write keys as text."),
        (pa.array(["{", "{}"], pa.json_()), "column 'c': is not valid JSON (Expecting property name enclosed in double quotes at column 2); correct or remove it."),
        (pa.array([b"\xff", b"x"]).view(pa.string()), "column 'c': is not UTF-8 (invalid start byte: byte 0xff); save it as UTF-8."),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_an_error_of_its_row(tmp_path, column, message):
    rows = parquet(tmp_path, {"text": ["a", "b"], "c": column})
    assert rows[1]["text"] == "b"
    with pytest.raises(RowError) as caught:
        rows[0]
    assert str(caught.value) == message


def test_bytes_are_refused_where_a_format_reads_them_and_harmless_elsewhere(tmp_path):
    row = parquet(tmp_path, {"text": ["a"], "other": [b"\xff"]})[0]
    assert FORMATS["text"].read(row, ColumnsConfig()).text == "a"
    row = parquet(tmp_path, {"text": [b"\xff"]}, "other.parquet")[0]
    with pytest.raises(RowError) as caught:
        FORMATS["text"].read(row, ColumnsConfig())
    assert str(caught.value) == "'text' is bytes that are no text in UTF-8, not text; correct the row."


def test_dates_in_every_kind_of_column(tmp_path):
    dates = pa.array([datetime.date(2024, 1, 31)])
    row = parquet(tmp_path, {"plain": dates, "code": dates.dictionary_encode()})[0]
    assert row == {"plain": "2024-01-31", "code": "2024-01-31"}
    view = pa.ListViewArray.from_arrays(pa.array([0], pa.int32()), pa.array([1], pa.int32()), dates)
    pa.feather.write_feather(pa.table({"view": view}), tmp_path / "v.feather", compression="uncompressed")
    assert open_rows([str(tmp_path / "v.feather")], "data.train")[0] == {"view": ["2024-01-31"]}


def test_tools_and_arguments_have_no_fields_of_others(tmp_path):
    """One struct for the arguments of all calls, and for the properties of all tools."""
    def turns(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]

    def tools(name):
        return [{"type": "function", "function": {"name": "f", "parameters": {"properties": {name: {"type": "string"}}}}}]

    rows = parquet(tmp_path, {"messages": [turns({"city": "Rome"}), turns({"days": 2})], "tools": [tools("city"), tools("days")]})
    for row, name, arguments in zip(rows, ("city", "days"), ({"city": "Rome"}, {"days": 2}), strict=True):
        found = FORMATS["messages"].read(row, ColumnsConfig())
        assert found.messages[1].calls[0].arguments == arguments and found.tools == tuple(tools(name))


def test_fields_that_arrow_fills_with_null_are_absent(tmp_path):
    """One struct for all messages has the fields of each: null where a message has not got it."""
    call = {"name": "f", "arguments": None}
    turns = [
        {"role": "user", "content": "a", "weight": None, "reasoning": None, "tool_calls": None},
        {"role": "assistant", "content": "b", "weight": 0.5, "reasoning": "r", "tool_calls": None},
    ]
    types = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.float64()), ("reasoning", pa.string()),
                                ("tool_calls", pa.list_(pa.struct([("name", pa.string()), ("arguments", pa.string())])))]))  # fmt: skip
    column = pa.array([turns, [{**turns[0], "tool_calls": [call]}, turns[1]]], types)
    rows = parquet(tmp_path, {"messages": column, "system": pa.array([None, None], pa.string()), "tools": pa.nulls(2)})
    assert detect_format(rows, ColumnsConfig()) == "messages"
    given = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5, "reasoning": "r"}]}
    form = FORMATS["messages"]
    assert form.read(rows[0], ColumnsConfig()) == form.read(given, ColumnsConfig())
    assert form.unread_fields(rows[0], ColumnsConfig()) == form.unread_fields(given, ColumnsConfig()) == set()
    with pytest.raises(RowError, match="tool call"):
        form.read(rows[1], ColumnsConfig())


def test_only_the_row_group_that_is_needed_is_read(tmp_path, monkeypatch):
    pa.parquet.write_table(pa.table({"n": list(range(100))}), tmp_path / "a.parquet", row_group_size=10)
    rows = open_rows([str(tmp_path / "a.parquet")], "data.train")
    read, real = [], pa.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(pa.parquet.ParquetFile, "read_row_group", lambda self, group: read.append(group) or real(self, group))
    assert rows[55] == {"n": 55} and rows.read(48, 52) == [{"n": number} for number in range(48, 52)] and rows[51] == {"n": 51}
    assert read == [5, 4]


def refused(path, message):
    with pytest.raises(UserError) as caught:
        open_rows([str(path)], "data.train")
    assert str(caught.value) == f"data.train: {path}{message}"


def test_files_that_cannot_be_used(tmp_path):
    def write(name, table):
        pa.parquet.write_table(table, tmp_path / name)
        return tmp_path / name

    refused(write("none.parquet", pa.table({"a": pa.array([], pa.string())})), ": holds no rows; leave it out, or write it again.")
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    refused(write("twice.parquet", twice), ": has two columns named 'a'; names must differ.")
    (tmp_path / "empty.arrow").write_bytes(b"")
    refused(tmp_path / "empty.arrow", ": is empty; leave it out, or write it again.")
    write_stream(tmp_path / "cut.arrow", [{"a": number} for number in range(200)])
    data = (tmp_path / "cut.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(data[:-8])  # behind the last batch, of which nothing is missing
    refused(tmp_path / "cut.arrow", ": is not a whole Arrow file (the mark of its end is missing); copy it again.")
    table = pa.table({"a": pa.array(["x"]).dictionary_encode()})
    with pa.OSFile(str(tmp_path / "dictionary.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    refused(
        tmp_path / "dictionary.arrow",
        ": is an Arrow stream with dictionary columns, whose batches cannot be read on their own; save it as Parquet.",
    )
    with pytest.raises(UserError, match="junk.parquet: is not a whole Parquet file .*; copy it again"):
        (tmp_path / "junk.parquet").write_bytes(b"junk" * 10)
        open_rows([str(tmp_path / "junk.parquet")], "data.train")


def test_numbers_that_are_none_stay_numbers(tmp_path):
    row = parquet(tmp_path, {"n": np.array([np.nan]), "m": np.array([np.inf])})[0]
    assert row["n"] != row["n"] and row["m"] == float("inf")


def test_a_dictionary_in_the_file_format_is_read(tmp_path):
    table = pa.table({"a": pa.array(["x", "y", "x"]).dictionary_encode()})
    pa.feather.write_feather(table, str(tmp_path / "a.feather"))
    assert list(open_rows([str(Path(tmp_path, "a.feather"))], "data.train")) == [{"a": "x"}, {"a": "y"}, {"a": "x"}]
