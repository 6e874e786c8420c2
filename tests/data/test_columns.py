"""Any schema through data.columns: names of fields in turns, names of roles, and texts made of several fields."""

import json

import pytest
from format_rows import ANSWER, ROWS, STANDARD, USER, read

from sft_jax.config import ColumnsConfig
from sft_jax.config_parsing import parse_config
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import Message
from sft_jax.data.formats.detection import detect_format, resolve_format
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.sources.registry import open_rows
from sft_jax.errors import UserError


@pytest.fixture
def rows_of(tmp_path):
    def make(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_rows([str(tmp_path / "rows.jsonl")], "data.train")

    return make


SUPPORT = ColumnsConfig(messages="dialog", role="speaker", content="text", roles={"customer": "user", "agent": "assistant"})


def test_names_of_fields_and_roles_in_turns(rows_of):
    row = {"dialog": [{"speaker": "customer", "text": "Hi", "at": 3}, {"speaker": "agent", "text": "Hello", "weight": 0.5}, {"speaker": "system", "text": "x"}]}
    wanted = (Message("user", "Hi"), Message("assistant", "Hello", 0.5), Message("system", "x"))
    assert read("messages", row, SUPPORT).messages == wanted
    assert detect_format(rows_of(row), SUPPORT) == "messages" == resolve_format("messages", rows_of(row), SUPPORT)
    assert FORMATS["messages"].unread_fields(row, SUPPORT) == {"dialog[].at"}
    turns = [{"from": "klant", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    columns = ColumnsConfig(roles={"klant": "user"})
    assert [message.role for message in read("sharegpt", {"conversations": turns}, columns).messages] == ["user", "assistant"]
    with pytest.raises(RowError, match="unknown role 'klant'"):
        read("sharegpt", {"conversations": turns})
    hidden = {"dialog": [{"speaker": "customer", "text": "Hi", "role": "x"}, {"speaker": "agent", "text": "Hello"}]}
    assert FORMATS["messages"].unread_fields(hidden, SUPPORT) == {"dialog[].role"}
    with pytest.raises(RowError, match="'role' is missing; the turn has: content"):  # another schema, so no row of this one
        read("messages", {"dialog": [{"role": "user", "text": "Hi"}, {"speaker": "agent", "text": "Hello"}]}, SUPPORT)
    tool = {"dialog": [{"speaker": "tool", "text": "1", "name": "f"}, {"speaker": "agent", "text": "Hello"}]}
    assert FORMATS["messages"].unread_fields(tool, SUPPORT) == set()
    with pytest.raises(UserError, match="data.columns.role: the format 'sharegpt' has no such field"):
        resolve_format("sharegpt", rows_of({"conversations": turns}), ColumnsConfig(role="from"))


def test_texts_of_several_fields(rows_of):
    columns = ColumnsConfig(prompt="{{ context }}\n\nQ: {{ question }}{% if hint %} ({{ hint }}){% endif %}", completion="answer")
    row = {"context": "C", "question": "Why?", "answer": "So.", "hint": None, "more": 1}
    found = read("prompt_completion", row, columns)
    assert (found.prompt, found.completion) == ("C\n\nQ: Why?", "So.")
    assert read("prompt_completion", {**row, "hint": "h"}, columns).prompt == "C\n\nQ: Why? (h)"
    assert detect_format(rows_of(row), columns) == "prompt_completion" == resolve_format("prompt_completion", rows_of(row), columns)
    assert FORMATS["prompt_completion"].unread_fields(row, columns) == {"more"}
    for null in ("{{ hint ~ question }}", "{{ hint | trim }}", "{{ [hint, question] | join }}", "{{ nested.x ~ question }}"):
        with pytest.raises(RowError, match="fails: "):
            read("prompt_completion", {**row, "nested": {"x": None}}, ColumnsConfig(prompt=null, completion="answer"))
    assert read("prompt_completion", {**row, "n": {"a": [None, 1]}}, ColumnsConfig(prompt="{{ n | tojson }}", completion="answer")).prompt == '{"a": [null, 1]}'
    choices = ColumnsConfig(prompt="{{ q }}{% for c in choices %}\n{{ loop.index }}. {{ c }}{% endfor %}", completion="{{ choices[right] }}")
    found = read("prompt_completion", {"q": "Which?", "choices": ["a", "b"], "right": 1}, choices)
    assert (found.prompt, found.completion) == ("Which?\n1. a\n2. b", "b")


@pytest.mark.parametrize(
    ("expression", "row", "message"),
    [
        ("{{ question }}", {"other": 1}, "'question' is undefined"),
        ("{{ question }}", {"question": None}, "it writes a field that is null"),
        ("{{ question }}", {"question": ["a"]}, "it writes a list"),
        ("{{ question ~ 'x' }}", {"question": ["a"]}, "it writes a list"),
        ("{{ dict }}", {}, "'dict' is undefined"),
        ("{{ range }}", {}, "it writes"),
        ("{{ question.a.b }}", {"question": {}}, "has no attribute 'a'"),
        ("{{ 1 / n }}", {"n": 0}, "division by zero"),
        ("{{ ''.__class__ }}", {}, "unsafe"),
    ],
)
def test_expressions_that_fail(expression, row, message):
    with pytest.raises(RowError, match=f"the expression .* fails: .*{message}"):
        read("prompt_completion", {"a": "x", **row}, ColumnsConfig(prompt=expression, completion="a"))


def test_wrong_columns(rows_of):
    rows = rows_of(ROWS["prompt_completion"][0])
    with pytest.raises(UserError, match=r"data.columns: '\{\{ prompt' is no valid expression"):
        detect_format(rows, ColumnsConfig(prompt="{{ prompt"))
    for find in (detect_format, lambda rows, columns: resolve_format("prompt_completion", rows, columns)):
        with pytest.raises(UserError, match="data.columns.prompt: no row has a field 'promt'; did you mean 'prompt'"):
            find(rows, ColumnsConfig(prompt="{{ promt }}"))
    for columns, message in (
        ({"messages": "{{ x }}"}, "data.columns.messages: '{{ x }}': only texts can be expressions"),
        ({"roles": {"agent": "asistant"}}, "data.columns.roles: 'agent' is to be 'asistant', which is no role; did you mean 'assistant'"),
    ):
        for data in ({"train": "x.jsonl", "columns": columns}, {"train": [{"path": "x.jsonl", "columns": columns}]}):
            with pytest.raises(UserError) as error:
                parse_config({"model": {"path": "m"}, "data": data})
            assert message.partition("data")[2].partition(":")[2] in str(error.value)


def test_standard_names_need_no_columns():
    assert read("messages", {"messages": [USER, ANSWER]}, STANDARD) == ROWS["messages"][1]
