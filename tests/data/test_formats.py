"""What each format reads, what it refuses, and that nothing else can happen."""

import json

import numpy as np
import pytest
from format_rows import ANSWER, ROWS, STANDARD, TURNS, USER, any_row, chat, fields, read
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.config import ColumnsConfig
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import ROLES, Message, Piece
from sft_jax.data.formats.detection import detect_format, resolve_format
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.formats.tool_calls import Call
from sft_jax.data.sources.registry import open_rows


@pytest.fixture
def rows_of(tmp_path):
    def make(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return open_rows([str(path)], "data.train")

    return make


def test_every_format_has_its_example_here():
    assert set(ROWS) == set(FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_format(name, rows_of):
    row, wanted = ROWS[name]
    assert read(name, row) == wanted
    assert detect_format(rows_of(row, {**row, "id": 7, "source": None}), STANDARD) == name
    kind = {"text": "text", "segments": "text", "tokens": "tokens", "prompt_completion": "completion", "alpaca": "completion"}.get(name, "chat")
    assert wanted.kind == kind


@pytest.mark.parametrize("name", ROWS)
def test_fields_under_other_names(name, rows_of):
    row, wanted = ROWS[name]
    form = FORMATS[name]
    renamed = {f"my_{field}": value for field, value in row.items()}
    columns = ColumnsConfig(**{
        column: f"my_{field}" for column, field in {**form.required, **form.optional}.items() if field in row
    })  # fmt: skip
    assert read(name, renamed, columns) == wanted
    assert detect_format(rows_of(renamed), columns) == name == resolve_format(name, rows_of(renamed), columns)


@pytest.mark.parametrize(
    ("name", "format_name", "used"),
    [
        ("fastchat/dummy_conversation.json", "sharegpt", 500),
        ("llamafactory_demo/alpaca_en_demo.json", "alpaca", 999),
        ("llamafactory_demo/identity.json", "alpaca", 91),
        ("llamafactory_demo/v1_sft_demo.jsonl", "messages", 500),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("llamafactory_demo/reason_tool_use_demo_50.jsonl", "messages", 50),
        ("sgd/sgd_messages.jsonl.gz", "messages", 1280),
    ],
)
def test_data_sets_as_they_occur(assets, name, format_name, used):
    rows = open_rows([str(assets / "datasets" / name)], "data.train")
    assert detect_format(rows, STANDARD) == format_name and len(rows) == used
    for row in rows:
        conversation = read(format_name, row)
        turns = row.get("messages") or row.get("conversations")
        if not turns:
            assert conversation.completion == row["output"] and row["input"] in conversation.prompt
            continue
        for turn, message in zip(turns, conversation.messages, strict=True):
            text = turn["content"] if "content" in turn else turn["value"]
            parts = text if isinstance(text, list) else [{"type": "tool_call" if turn.get("from") == "function_call" else "text", "value": text}]
            assert message.content == "".join(part["value"] for part in parts if part["type"] == "text")
            calls = [json.loads(part["value"]) for part in parts if part["type"] == "tool_call"]
            calls += [{"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])} for call in turn.get("tool_calls", [])]
            assert [(call.name, call.arguments) for call in message.calls] == [(call["name"], call["arguments"]) for call in calls]
        given = row.get("tools") or "[]"
        given = json.loads(given) if isinstance(given, str) else given
        assert [tool["function"] for tool in conversation.tools or ()] == [tool.get("function", tool) for tool in given]


def test_calls_and_tools_in_all_their_forms():
    wanted = (Call("f", {"a": 1}, '{"a": 1}'),)
    function = {"name": "f", "arguments": {"a": 1}}
    for turn in (
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
        {"role": "assistant", "tool_calls": [function]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([function])},
        {"role": "assistant", "content": None, "function_call": {**function, "arguments": '{"a": 1}'}},
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(function)}]},
    ):
        assert read("messages", chat(USER, turn)).messages[1] == Message("assistant", "", calls=wanted)
    turns = [{"from": "human", "value": "x"}, {"from": "function_call", "value": json.dumps([function])}]
    assert read("sharegpt", {"conversations": turns}).messages[1].calls == wanted
    tool = {"name": "f", "parameters": {}}
    whole = ({"type": "function", "function": tool},)
    for tools in ([tool], json.dumps([tool]), [*whole], [{"type": "function", **tool}]):
        assert read("messages", chat(USER, ANSWER, tools=tools)).tools == whole
        assert read("messages", chat(USER, ANSWER, functions=tools), ColumnsConfig(tools="functions")).tools == whole
    answered = {"role": "tool", "content": "1", "tool_call_id": "x", "name": "f"}
    assert read("messages", chat(answered, ANSWER)).messages[0] == Message("tool", "1", call_id="x", name="f")
    assert FORMATS["messages"].unread_fields(chat(answered, ANSWER, tools=[tool]), STANDARD) == set()


def test_an_expression_may_read_what_would_be_refused():
    row = {"tools": '[{"name": "f"}]', "body": "hi"}
    assert read("text", row, ColumnsConfig(text="{{ tools }} {{ body }}")).text == '[{"name": "f"}] hi'


def test_template_arguments_of_a_row():
    for given, wanted in (({"a": 1}, {"a": 1}), ({}, None), (None, None), ({"a": None}, None)):
        assert read("messages", chat(USER, ANSWER, chat_template_kwargs=given)).template_kwargs == wanted
    for wrong, message in (
        ("x", "is text, not an object"),
        ({"messages": []}, "'messages' is what every render sets itself"),
        ({"a": ["<\udfff"]}, r"\.a\[0\]: '<\\udfff' holds half of a surrogate pair"),
        ({"\ud800": 1}, r": '\\ud800' holds half of a surrogate pair"),
    ):
        with pytest.raises(RowError, match=f"chat_template_kwargs.*{message}"):
            read("messages", chat(USER, ANSWER, chat_template_kwargs=wrong))


def test_weights_of_llamafactory(assets):
    rows = open_rows([str(assets / "datasets/llamafactory_demo/v1_sft_demo.jsonl")], "data.train")
    assert [message.weight for message in read("messages", rows[0]).messages] == [0.0, 1.0]


def test_weights_of_messages():
    turns = [
        {**ANSWER, **extra}
        for extra in ({}, {"weight": 0.5}, {"weight": 0}, {"train": False}, {"train": True}, {"weight": None})
    ]
    messages = read("messages", chat(USER, *turns)).messages
    assert [message.weight for message in messages] == [None, None, 0.5, 0.0, 0.0, 1.0, None]
    turns = [{"from": "gpt", "value": "x", "train": False}, {"from": "gpt", "value": "x", "weight": 2}]
    assert [message.weight for message in read("sharegpt", {"conversations": turns}).messages] == [0.0, 2.0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"weight": -0.1}, "0 or more and finite, not -0.1"),
        ({"weight": float("nan")}, "finite"),
        ({"weight": 10**400}, "finite"),
        ({"weight": 1e39}, r"0, or from 1e-06 to 1e\+06, not 1e\+39"),
        ({"weight": 1e-44}, "0, or from 1e-06"),
        ({"weight": "1"}, "'weight' is text, not a number"),
        ({"weight": True}, "'weight' is true or false, not a number"),
        ({"train": 1}, "'train' is a number, not true or false"),
        ({"train": True, "weight": 1}, "both 'weight' and 'train'"),
    ],
)
def test_weights_that_are_none(extra, message):
    with pytest.raises(RowError, match=rf"messages\[1\].*{message}"):
        read("messages", chat(USER, {**ANSWER, **extra}))


def test_contents_in_parts_and_reasoning():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert read("messages", chat(USER, {**ANSWER, "content": parts})).messages == TURNS
    parts = [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Hello"}]
    thought = Message("assistant", "Hello", reasoning="Hm.")
    assert read("messages", chat(USER, {**ANSWER, "content": parts})).messages[1] == thought
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert read("messages", chat(USER, {**ANSWER, name: "Hm."})).messages[1] == thought
    with pytest.raises(RowError, match="more than once"):
        read("messages", chat(USER, {**ANSWER, "content": parts, "thinking": "Hm."}))
    with pytest.raises(RowError, match="only an assistant's"):
        read("messages", chat({**USER, "thinking": "Hm."}, ANSWER))


def test_system_prompts():
    system = Message("system", "Be brief.")
    assert read("messages", chat({"role": "system", "content": "Be brief."}, USER, ANSWER)).messages == (system, *TURNS)
    assert read("messages", chat(USER, ANSWER, system="Be brief.")).messages == (system, *TURNS)
    assert read("messages", chat(USER, ANSWER, system="")).messages == TURNS
    row = {**ROWS["sharegpt"][0], "sys": "Be brief."}
    assert read("sharegpt", row, ColumnsConfig(system="sys")).messages == (system, *TURNS)
    for name in ("prompt_completion", "alpaca"):
        conversation = read(name, {**ROWS[name][0], "system": "Be brief."})
        assert conversation.system == "Be brief." and conversation.kind == "completion"
    with pytest.raises(RowError, match="both give a system prompt"):
        read("messages", chat({"role": "developer", "content": "x"}, USER, ANSWER, system="y"))


def test_alpaca_with_input_and_history():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"], ["So?", "So."]]}
    messages = read("alpaca", row).messages
    assert [(message.role, message.content) for message in messages] == [
        ("user", "Hi"), ("assistant", "Hello"), ("user", "So?"), ("assistant", "So."),
        ("user", "Add.\n\n1 2"), ("assistant", "3"),
    ]  # fmt: skip
    for missing in (None, []):
        conversation = read("alpaca", {**row, "history": missing})
        assert (conversation.prompt, conversation.completion) == ("Add.\n\n1 2", "3")
    assert read("alpaca", {"instruction": "Add.", "output": "3", "input": None}).prompt == "Add."
    for wrong in ("x", [["a"]], [["a", 1]], ["ab"]):
        with pytest.raises(RowError, match="history"):
            read("alpaca", {**row, "history": wrong})


def test_messages_of_a_prompt_are_no_answers():
    earlier = [USER, {**ANSWER, "content": "Earlier"}, USER]
    messages = read("prompt_completion", {"prompt": earlier, "completion": [ANSWER]}).messages
    assert [(message.content, message.given) for message in messages] == [
        ("Hi", True), ("Earlier", True), ("Hi", True), ("Hello", False),
    ]  # fmt: skip
    with pytest.raises(RowError, match="both as text, or both as lists"):
        read("prompt_completion", {"prompt": earlier, "completion": "x"})
    with pytest.raises(RowError, match="'completion' has no assistant turn"):
        read("prompt_completion", {"prompt": [ANSWER], "completion": [USER]})


def test_parts_with_weights():
    parts = [{"type": "text", "text": "Hel", "weight": 0}, {"type": "text", "text": "lo"}, {"type": "text", "text": "!", "train": True}]
    message = read("messages", chat(USER, {**ANSWER, "content": parts, "weight": 0.5})).messages[1]
    assert message == Message("assistant", "Hello!", 0.5, pieces=(Piece(0, 3, 0.0), Piece(5, 6, 1.0)))
    for part, wrong in (({"type": "text", "text": "x", "weight": -1}, "0 or more"), ({"type": "reasoning", "value": "x", "weight": 1}, "only parts of type 'text'")):
        with pytest.raises(RowError, match=wrong):
            read("messages", chat(USER, {**ANSWER, "content": [part, *parts]}))


def test_tokens():
    for extra, wanted in (
        ({}, [1, 1, 1]), ({"weights": [0, 0.5, 2]}, [0, 0.5, 2]), ({"labels": [-100, -100, 7]}, [0, 0, 1]), ({"attention_mask": [1, 1, 1]}, [1, 1, 1]),
    ):  # fmt: skip
        found = read("tokens", {"input_ids": [5, 0, 7], **extra})
        assert found.ids.tolist() == [5, 0, 7] and found.weights.tolist() == wanted
        assert (found.ids.dtype, found.weights.dtype) == (np.int32, np.float32)


def test_text_rows_without_text():
    for text in ("", " \n"):
        with pytest.raises(RowError, match="'text' is empty"):
            read("text", {"text": text})


def test_fields_that_nothing_reads():
    turns = [{**USER, "name": "Bob", "weight": 1}, {**ANSWER, "name": None, "reasoning": "x", "id": 3}]
    for name, row, columns, unread in (
        ("messages", chat(*turns, id=7, source=None, tools=[], system="s"), STANDARD, {"id", "messages[].name", "messages[].id"}),
        ("alpaca", {"instruction": "a", "output": "b", "history": [], "lang": "en"}, STANDARD, {"lang"}),
        ("prompt_completion", {"q": "a", "a": "b", "prompt": "c"}, ColumnsConfig(prompt="q", completion="a"), {"prompt"}),
        ("prompt_completion", {"prompt": turns[:1], "completion": [ANSWER]}, STANDARD, {"prompt[].name"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a", "turn": 1}], "x": 1}, STANDARD, {"conversations[].turn", "x"}),
        ("text", {"text": "a", "meta": {}}, STANDARD, {"meta"}),
    ):
        assert FORMATS[name].unread_fields(row, columns) == unread


def test_every_role(rows_of):
    for role in ROLES:
        turns = [{"role": role, "content": "x"}, ANSWER]
        assert read("messages", chat(*turns)).messages[0] == Message(role, "x")
    mapped = {
        "human": "user",
        "gpt": "assistant",
        "system": "system",
        "observation": "tool",
        "tool": "tool",
        "model": "assistant",
    }
    for speaker, role in mapped.items():
        turns = [{"from": speaker, "value": "x"}, {"from": "gpt", "value": "y"}]
        assert read("sharegpt", {"conversations": turns}).messages[0].role == role


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("messages", {}, "field 'messages' is missing.*the row is empty"),
        ("messages", {"mesages": [USER]}, "field 'messages' is missing.*did you mean 'mesages'"),
        ("messages", {"messages": None}, "field 'messages' is null"),
        ("messages", {"messages": "x"}, "'messages' is text, not a list"),
        ("messages", {"messages": []}, "'messages' is empty"),
        ("messages", {"messages": ["x"]}, r"'messages\[0\]' is text, not an object with 'role' and 'content'"),
        ("messages", chat(USER), "no assistant turn"),
        ("messages", chat(USER, {"role": "assistant"}), r"messages\[1\]: 'content' is missing; the turn has: role"),
        ("messages", chat(USER, {"role": "assistant", "content": None}), r"messages\[1\]: 'content' is null"),
        ("messages", chat({"role": "asistant", "content": "x"}), "unknown role 'asistant'; did you mean 'assistant'"),
        (
            "messages",
            chat({"role": "human", "content": "x"}),
            "unknown role 'human'; did you mean 'user'.*Known: assistant",
        ),
        ("messages", chat({"role": 1, "content": "x"}), r"messages\[0\].role' is a number, not text"),
        ("messages", chat(USER, {**ANSWER, "content": 7}), r"messages\[1\].content' is a number"),
        ("messages", chat({"role": "user", "content": [{"type": "image_url"}]}), "type 'image_url' are not supported"),
        ("messages", chat({"role": "user", "content": [{"type": "text"}]}), "needs one 'text'"),
        ("messages", chat({"role": "user", "content": [{"type": ["text"]}]}), "not supported"),
        ("messages", chat(USER, {"role": "assistant", "tool_calls": [{}]}), r"messages\[1\].tool_calls\[0\]: has no 'name'"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": "{"}), r"'messages\[1\].tool_calls' is not valid JSON"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": {"name": "f"}}), "is an object, not a list of calls"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}), "arguments' is not valid JSON"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "1, \"b\": 2"}]}), "arguments' is not valid JSON"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}), "arguments' is a list, not an object"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": [{"type": "custom"}]}), "calls of type 'custom' are not supported"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": [{"name": "f", "id": 3}]}), "id' is a number, not text"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}), "has both"),
        ("messages", chat({**USER, "tool_calls": [{"name": "f"}]}, ANSWER), "a tool call in a turn of the user"),
        ("messages", chat({"role": "tool", "content": "x", "tool_call_id": 3}, ANSWER), "tool_call_id' is a number"),
        ("messages", chat(USER, ANSWER, tools=[{"type": "function"}]), r"tools\[0\]: has no 'name'"),
        ("messages", chat(USER, ANSWER, tools="x"), "'tools' is not valid JSON"),
        ("messages", chat(USER, ANSWER, tools=[{"type": "web_search", "name": "f"}]), "tools of type 'web_search' are not supported"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {"a": float("nan")}}]}), "a number, which JSON cannot hold"),
        ("messages", chat(USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {1: 2}}]}), "a field whose name is a number"),
        ("messages", chat(USER, ANSWER, tools=[1]), r"'tools\[0\]' is a number, not a tool"),
        ("messages", chat(USER, ANSWER, functions=[{"name": "f"}]), "'functions' brings tools and is not read; set data.columns.tools=functions"),
        ("text", {"text": "x", "tools": [{"name": "f"}]}, "brings tools, which are not supported"),
        ("messages", chat(USER, ANSWER, images=["a.png"]), "field 'images' brings images"),
        ("messages", chat(USER, {**ANSWER, "content": "a\ud800"}), "half of a surrogate pair at character 2"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{}"}]}, r"conversations\[0\].value: has no 'name'"),
        ("sharegpt", {"conversations": [{"from": "humn", "value": "x"}]}, "unknown role 'humn'; did you mean 'human'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "no assistant turn"),
        (
            "sharegpt",
            {"conversations": [{"role": "user", "content": "x"}]},
            "'from' is missing; the turn has: role, content",
        ),
        ("prompt_completion", {"prompt": "x"}, "field 'completion' is missing"),
        ("prompt_completion", {"prompt": "x", "completion": 3}, "'prompt' is text and 'completion' is a number"),
        ("prompt_completion", {"prompt": 3, "completion": 4}, "'prompt' is a number, not text"),
        ("alpaca", {"instruction": "x", "output": 3}, "'output' is a number"),
        ("alpaca", {"instruction": "x", "input": [], "output": "y"}, "'input' is a list"),
        ("text", {"text": ["x"]}, "'text' is a list, not text"),
        ("text", {"text": "x", "system": 1}, None),
        ("segments", {"segments": "x"}, "'segments' is text, not a list"),
        ("segments", {"segments": [{"label": True}]}, r"'segments\[0\]' has no 'text'"),
        ("segments", {"segments": [{"text": "x"}]}, r"segments\[0\]: needs either 'label', true or false, or a 'weight'"),
        ("segments", {"segments": [{"text": "x", "label": 1}]}, "needs either 'label', true or false"),
        ("segments", {"segments": [{"text": "x", "label": True, "weight": 1}]}, "needs either"),
        ("segments", {"segments": [{"text": " ", "label": True}]}, "holds no text"),
        ("tokens", {"input_ids": "x"}, "'input_ids' is not a list of whole numbers"),
        ("tokens", {"input_ids": [1.5, 2]}, "'input_ids' is not a list of whole numbers"),
        ("tokens", {"input_ids": [[1], [2, 3]]}, "'input_ids' is not a list of whole numbers"),
        ("tokens", {"input_ids": [10**30, 2]}, "'input_ids' is not a list of whole numbers"),
        ("tokens", {"input_ids": [1]}, "holds 1 tokens, so there is nothing to predict"),
        ("tokens", {"input_ids": [-1, 2]}, "holds -1, which is no token id"),
        ("tokens", {"input_ids": [1, 2], "weights": [1]}, "'weights' has 1 numbers for 2 tokens"),
        ("tokens", {"input_ids": [1, 2], "weights": [1, float("nan")]}, "must be 0, or from 1e-06 to .*, not nan"),
        ("tokens", {"input_ids": [1, 2], "weights": [1, -1]}, "not -1.0"),
        ("tokens", {"input_ids": [1, 2], "weights": [1, 1], "labels": [1, 2]}, "has both 'weights' and 'labels'"),
        ("tokens", {"input_ids": [1, 2], "labels": [2, -100]}, "'labels' has 2 at token 0, where the id is 1"),
        ("tokens", {"input_ids": [1, 2], "attention_mask": [1, 0]}, "the row is padded"),
    ],
)
def test_rows_that_cannot_be_used(name, row, message):
    if message is None:
        assert read(name, row).text == "x"
        return
    with pytest.raises(RowError, match=message):
        read(name, row)


def test_empty_marks_of_tools_are_no_tools():
    for nothing in (None, "", "[]", [], {}):
        row = chat({**USER, "tool_calls": nothing}, ANSWER, tools=nothing)
        assert read("messages", row).messages == TURNS


@settings(max_examples=400, deadline=None)
@given(any_row, st.sampled_from(list(FORMATS)), st.builds(ColumnsConfig, system=fields, messages=fields))
def test_any_row_is_a_conversation_or_a_row_error(row, name, columns):
    for used in (STANDARD, columns):
        FORMATS[name].misfit(row, used)
        try:
            conversation = read(name, row, used)
        except RowError as error:
            assert str(error)
            continue
        kinds = (conversation.messages, conversation.completion, conversation.text, conversation.ids)
        assert sum(each is not None for each in kinds) == 1
        if conversation.kind == "chat":
            assert any(message.role == "assistant" for message in conversation.messages)
            for message in conversation.messages:
                assert message.role in ROLES and isinstance(message.content, str)
                assert message.weight is None or message.weight >= 0
