"""What one row shows on its own: planted faults are found, what only looks like them is not."""

import time

import pytest
from doctor_data import chat, pair
from slow_values import slow

from sft_jax.config import ColumnsConfig
from sft_jax.data.formats.registry import FORMATS
from sft_jax.doctor import endings, row_checks
from sft_jax.doctor.facts import ROW_CHECKS
from sft_jax.doctor.json_forms import json_forms
from sft_jax.doctor.texts import texts_of

USER, ASSISTANT, SYSTEM, TOOL = ("user", "a"), ("assistant", "b"), ("system", "s"), ("tool", "t")


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([ASSISTANT, USER, ASSISTANT], ["messages[0]: begins with the assistant"]),
        ([SYSTEM, ASSISTANT], ["messages[1]: begins with the assistant"]),
        ([USER, ASSISTANT, ASSISTANT], ["messages[2]: two turns of the assistant in a row"]),
        ([USER, USER, ASSISTANT], ["messages[1]: two turns of the user in a row"]),
        ([USER, SYSTEM, ASSISTANT], ["messages[1]: a system message after others"]),
        ([USER, TOOL, ASSISTANT], ["messages[1]: a tool result without a turn of the assistant before it"]),
        ([USER, ASSISTANT, USER], ["messages[2]: ends with the user, so that nothing answers it"]),
        ([USER, ASSISTANT, TOOL], ["messages[2]: ends with the tool, so that nothing answers it"]),
        (
            [USER, ASSISTANT, TOOL, USER, ASSISTANT],
            ["messages[3]: a turn of the user after a tool result, which the assistant has not answered"],
        ),
        ([USER, ASSISTANT], []),
        ([SYSTEM, USER, ASSISTANT, USER, ASSISTANT], []),
        ([SYSTEM, ("developer", "d"), USER, ASSISTANT], []),
        ([USER, ASSISTANT, TOOL, TOOL, ASSISTANT, USER, ASSISTANT], []),
    ],
)
def test_role_order(turns, found):
    assert row_checks.role_order(chat(*turns)) == found


@pytest.mark.parametrize("answer", ["", " \n\t", "\u200b\u200b", "\u00a0"])
def test_empty_answers_are_found(answer):
    assert row_checks.empty_answer(pair(answer)) == ["the answer is empty"]


def test_the_empty_answer_of_a_chat_is_named():
    turns = [USER, ("assistant", " "), USER, ASSISTANT]
    assert row_checks.empty_answer(chat(*turns)) == ["answer 1 of 2 is empty"]
    assert row_checks.empty_answer(pair("0")) == row_checks.empty_answer(pair("👍")) == []


@pytest.mark.parametrize(
    ("answer", "found"), [("Yes.", True), ("42", True), ("是", True), ("Yes, it is.", False), ("是的，没有问题。", False)]
)
def test_one_word_answer(answer, found):
    assert bool(row_checks.one_word_answer(pair(answer))) is found


@pytest.mark.parametrize(
    "text", ["Itâ€™s a nice day in the cafÃ©", "ÐŸÑ€Ð¸Ð²ÐµÑ‚ Ð¼Ð¸Ñ€", "a lost \ufffd character", "schÃ¶n und grÃ¼n"]
)
def test_mojibake_is_found(text):
    assert row_checks.mojibake(pair(text))


@pytest.mark.parametrize(
    "text",
    [
        "It’s a nice day in the café — naïve, isn’t it?",
        "Привет, мир",
        "你好，世界！",
        "مرحبا بالعالم",
        "שלום עולם",
        "Straße, Grüße, año, Øre",
        "🎉👍🏽 π ≈ 3.14 × 10⁰ °C",
        "สวัสดีชาวโลก",
        "नमस्ते दुनिया",
        "½ cup, 5€, £3, ©®™",
    ],
)
def test_text_of_any_language_is_no_mojibake(text):
    assert row_checks.mojibake(pair(text)) == []


def test_unbalanced_fences():
    assert row_checks.unbalanced_fences(pair("See:\n```python\nx = 1\n")) == ['a code block is not closed: "```python x = 1"']
    assert row_checks.unbalanced_fences(pair("```\na\n```\n```\nb"))
    for fine in (
        "```python\nx = 1\n```",
        "```\na\n```\nand\n~~~\nb\n~~~",
        "````markdown\n```python\nx\n```\n````",  # three marks do not close four
        "Write ```` ``` ```` for a fence, or ``` x ``` in a line.",
        "Use `code` here.",
        "1. a\n   ```sh\n   ls\n   ```",
    ):
        assert row_checks.unbalanced_fences(pair(fine)) == [], fine


def test_repeats_prompt():
    question = "What is the capital of France, and why?"
    assert row_checks.repeats_prompt(pair(question, question)) == ["the answer is the question again"]
    assert row_checks.repeats_prompt(pair("what is the capital of france and why? Paris.", question)) == [
        "the answer begins with the whole question"
    ]
    assert row_checks.repeats_prompt(pair("The capital of France is Paris.", question)) == []
    assert row_checks.repeats_prompt(pair("Hi there!", "Hi there!")) == []
    turns = ("user", question), ("assistant", question), ("user", question), ("assistant", "Paris.")
    assert row_checks.repeats_prompt(chat(*turns)) == ["answer 1 of 2 is the question again"]
    assert row_checks.repeats_prompt(pair("I has a dog.", "Correct the sentence: I has a dog.")) == []


HOSTILE = [
    "a" * 1_000_000, "a " * 500_000, "1 " * 500_000, "1" * 1_000_000, "@" * 1_000_000, "a@" * 500_000,
    "a.b@c." * 170_000, "`" * 1_000_000,
    "```\n" * 250_000, "<" * 1_000_000, "<|" * 500_000, "\n" * 1_000_000, " " * 1_000_000, "Ã" * 1_000_000,
    "â€" * 500_000, "AB12 " * 200_000,
    "-----BEGIN PRIVATE KEY-----" * 37_000, "eyJaaaaaaaaaaaa." * 62_000, "sorry " * 166_000,
    "i'm sorry, i cannot " * 50_000, "sk-" * 333_000,
    "<s>" * 333_000, "as an ai " * 111_000, "\u0301" * 500_000, "- " * 500_000, "~~~ `" * 200_000, "我" * 1_000_000,
    "$\\{}" * 250_000, "</s>" * 250_000, "<s></s>" * 140_000, "<think>" * 140_000, "```json\n" * 120_000, "{" * 1_000_000,
    "at least " * 110_000,
]  # fmt: skip


@pytest.mark.parametrize("text", [*HOSTILE[::3], *slow(*(text for number, text in enumerate(HOSTILE) if number % 3))], ids=lambda text: ascii(text[:12]))
def test_hostile_text_of_a_megabyte_takes_linear_time(text):
    texts = pair(text, text)
    further = {"open_ending": endings.open_ending, "json_forms": json_forms}
    for kind, check in {**ROW_CHECKS, **further}.items():
        begin = time.process_time()
        check(texts)
        assert time.process_time() - begin < 5, kind


def _calling(*turns):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    return texts_of(FORMATS["messages"].read({"messages": list(turns), "tools": tools}, ColumnsConfig()))


_ASKED = {"role": "user", "content": "How is the weather in Rome today?"}
_CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}
_RESULT = {"role": "tool", "content": "sunny"}


def test_a_turn_of_calls_is_an_answer():
    texts = _calling(_ASKED, _CALL, _RESULT, {"role": "assistant", "content": "It is sunny."})
    for check in (row_checks.empty_answer, row_checks.role_order, endings.cut_answer, row_checks.one_word_answer):
        assert check(texts) == []
    assert row_checks.empty_answer(_calling(_ASKED, _CALL)) == endings.cut_answer(_calling(_ASKED, _CALL)) == []
    assert texts.answers == ('weather {"city": "Rome"}', "It is sunny.")


def test_a_call_without_a_result_is_out_of_order():
    texts = _calling(_ASKED, _CALL, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "It is sunny."})
    assert row_checks.role_order(texts) == ["messages[2]: a turn of the user after a call of a tool, which has no result"]


def test_personal_data_are_found_in_calls_and_reasoning_too():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "send", "arguments": {"to": "someone.real@mail.example.org"}}]}
    thought = {"role": "assistant", "content": "Done.", "reasoning_content": "The number is 4111 1111 1111 1111."}
    for turn, kind in ((call, "e-mail"), (thought, "card")):
        (found,) = row_checks.personal_data(_calling(_ASKED, turn))
        assert kind in found and "someone.real" not in found and "1111 1111" not in found
