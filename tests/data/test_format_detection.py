"""Which format a data set has is decided by all of its rows."""

import json

import pytest
from format_rows import ANSWER, ROWS, STANDARD, USER, any_row, fields, read
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.config import ColumnsConfig
from sft_jax.data.formats.detection import detect_format, resolve_format
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.sources.registry import open_rows
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


def test_every_row_of_a_large_data_set_counts(rows_of):
    """One row among tens of thousands decides, wherever it stands."""
    good = [{"n": index, **ROWS["text"][0]} for index in range(20_003)]
    good[12_345] |= {"prompt": "x", "sys": "s"}
    rows = rows_of(*good)
    assert detect_format(rows, STANDARD) == "text"
    odd = rows_of(*good[:17_001], {"prompt": "x", "completion": "y"}, *good[17_001:], name="odd.jsonl")
    with pytest.raises(UserError, match=r"odd.jsonl:17002: is not in the format 'text', which 20003 of 20004 rows have"):
        detect_format(odd, STANDARD)
    pairs = [{"prompt": "x", "completion": "y"} for _ in range(20_003)]
    pairs[15_001]["sys"] = "s"
    rows = rows_of(*pairs, name="pairs.jsonl")
    for name in ("auto", "prompt_completion"):
        assert resolve_format(name, rows, ColumnsConfig(system="sys")) == "prompt_completion"
        with pytest.raises(UserError, match="data.columns.system: no row has a field 'syss'"):
            resolve_format(name, rows, ColumnsConfig(system="syss"))


def test_as_many_rows_of_one_format_as_of_another(rows_of):
    text, pair = ROWS["text"][0], ROWS["prompt_completion"][0]
    for skip in (False, True):
        with pytest.raises(
            UserError,
            match=r"rows.jsonl:2 is in the format 'prompt_completion' and .*rows.jsonl:1 in the format 'text', and as many rows",
        ):
            detect_format(rows_of(text, pair, pair, text), STANDARD, skip)
    with pytest.raises(UserError, match="rows.jsonl:2: the rows fit the formats prompt_completion and text"):
        detect_format(rows_of({"odd": 1}, {**text, **pair}), STANDARD)


def test_columns_that_no_format_or_row_has(rows_of):
    rows = rows_of(ROWS["alpaca"][0])
    with pytest.raises(UserError, match="no format has all of prompt, output"):
        detect_format(rows, ColumnsConfig(prompt="a", output="b"))
    with pytest.raises(UserError, match="data.columns.prompt: the format 'alpaca' has no such field.*Known: chat_template_kwargs, input"):
        resolve_format("alpaca", rows, ColumnsConfig(prompt="a"))
    for run in (lambda columns: detect_format(rows, columns), lambda columns: resolve_format("alpaca", rows, columns)):
        with pytest.raises(UserError, match="data.columns.input: no row has a field 'inptu'; did you mean 'input'"):
            run(ColumnsConfig(input="inptu"))


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
