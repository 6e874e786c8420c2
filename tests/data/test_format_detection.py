"""Which format a data set has is decided by all of its rows."""

import json

import pytest
from format_rows import ANSWER, ROWS, STANDARD, USER, any_row, fields, read
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.config import ColumnsConfig
from sft_jax.data import formats
from sft_jax.data.formats import FORMATS, detect_format, resolve_format
from sft_jax.data.sources import open_rows
from sft_jax.errors import UserError


@pytest.fixture
def rows_of(tmp_path):
    def make(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return open_rows([str(path)], "data.train")

    return make


def test_gsm8k(assets):
    rows = open_rows([str(assets / "datasets/gsm8k/test.jsonl")], "data.train")
    columns = ColumnsConfig(prompt="question", completion="answer")
    assert detect_format(rows, columns) == "prompt_completion"
    conversation = read("prompt_completion", rows[0], columns)
    assert (conversation.prompt, conversation.completion) == (rows[0]["question"], rows[0]["answer"])
    with pytest.raises(
        UserError, match="test.jsonl:1: fits no format; the row has: question, answer.*data.columns.prompt"
    ):
        detect_format(rows, STANDARD)


def test_the_first_row_that_does_not_fit_is_named(rows_of):
    good, odd = ROWS["messages"][0], {"prompt": "x", "completion": "y"}
    rows = rows_of(*[good] * 499, odd, *[good] * 20, odd)
    with pytest.raises(
        UserError,
        match=r"rows.jsonl:500: is not in the format 'messages', which 519 of 521 rows have.*'messages' is missing",
    ):
        detect_format(rows, STANDARD)
    assert detect_format(rows, STANDARD, skip_bad_rows=True) == "messages"


def test_the_first_row_does_not_decide(rows_of):
    both = {**ROWS["messages"][0], "text": "rendered"}
    assert detect_format(rows_of(both, ROWS["messages"][0]), STANDARD) == "messages"
    with pytest.raises(
        UserError, match="rows.jsonl:1: the rows fit the formats messages and text; name one.*data.format=messages"
    ):
        detect_format(rows_of(both, both), STANDARD)
    assert resolve_format("text", rows_of(both), STANDARD) == "text"
    assert detect_format(rows_of(both), ColumnsConfig(text="text")) == "text"


def test_fields_that_are_null_do_not_count(rows_of):
    row = {"messages": None, "text": None, **ROWS["prompt_completion"][0]}
    assert detect_format(rows_of(row), STANDARD) == "prompt_completion"


def test_turns_tell_messages_and_sharegpt_apart(rows_of):
    turns = ROWS["sharegpt"][0]["conversations"]
    columns = ColumnsConfig(messages="dialogue")
    assert detect_format(rows_of({"dialogue": turns}), columns) == "sharegpt"
    assert detect_format(rows_of({"dialogue": [USER, ANSWER]}), columns) == "messages"
    # Messages in ShareGPT's field
    with pytest.raises(
        UserError, match="fits no format.*turns in 'conversations' have no 'from' and 'value'.*data.columns.messages"
    ):
        detect_format(rows_of({"conversations": [USER, ANSWER]}), STANDARD)
    assert (
        detect_format(rows_of({"conversations": [USER, ANSWER]}), ColumnsConfig(messages="conversations")) == "messages"
    )


def test_malformed_rows_while_detecting(rows_of):
    good = ROWS["text"][0]
    rows = rows_of(good, "{", good)
    with pytest.raises(UserError, match=r"rows.jsonl:2: is not valid JSON"):
        detect_format(rows, STANDARD)
    assert detect_format(rows, STANDARD, skip_bad_rows=True) == "text"
    with pytest.raises(UserError, match="rows.jsonl:1: neither this row nor any other can be read"):
        detect_format(rows_of("{", "["), STANDARD, skip_bad_rows=True)


def test_large_data_sets_are_sampled_evenly(rows_of, monkeypatch):
    monkeypatch.setattr(formats, "SCANNED", 10)
    rows = rows_of(*[{"n": index, **ROWS["text"][0]} for index in range(95)])
    seen = [row["n"] for _, row in formats._scan(rows, strict=True)]
    assert (
        len(seen) == 10
        and seen[0] == 0
        and seen[-1] == 94
        and max(b - a for a, b in zip(seen[:-1], seen[1:], strict=True)) <= 11
    )
    assert detect_format(rows, STANDARD) == "text"


def test_columns_that_no_format_or_row_has(rows_of):
    rows = rows_of(ROWS["alpaca"][0])
    with pytest.raises(UserError, match="no format has all of prompt, output"):
        detect_format(rows, ColumnsConfig(prompt="a", output="b"))
    with pytest.raises(UserError, match="data.columns.prompt: the format 'alpaca' has no such field.*Known: input"):
        resolve_format("alpaca", rows, ColumnsConfig(prompt="a"))
    for run in (lambda columns: detect_format(rows, columns), lambda columns: resolve_format("alpaca", rows, columns)):
        with pytest.raises(UserError, match="data.columns.input: no row has a field 'inptu'; did you mean 'input'"):
            run(ColumnsConfig(input="inptu"))
    with pytest.raises(UserError, match="data.format: 'alpacca' is not a format; did you mean 'alpaca'"):
        resolve_format("alpacca", rows, STANDARD)


@settings(max_examples=100, deadline=None)
@given(st.lists(any_row, min_size=1, max_size=5), st.booleans(), st.builds(ColumnsConfig, system=st.just("") | fields))
def test_detection_gives_a_format_or_a_user_error(tmp_path_factory, rows, skip, columns):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_rows([str(path)], "data.train")
    try:
        name = detect_format(opened, columns, skip)
    except UserError:
        return
    fits = [not FORMATS[name].misfit(row, columns) for row in rows]
    assert all(fits) or (skip and any(fits))
