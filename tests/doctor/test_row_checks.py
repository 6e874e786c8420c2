"""What one row shows on its own: planted faults are found, what only looks like them is not."""

import time

import pytest
from slow_values import slow

from sft_jax.config import ColumnsConfig
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.data.formats.registry import FORMATS
from sft_jax.doctor import row_checks
from sft_jax.doctor.facts import ROW_CHECKS
from sft_jax.doctor.texts import texts_of


def pair(answer, prompt="What do you think of that?"):
    return texts_of(Conversation(prompt=prompt, completion=answer))


def chat(*turns):
    return texts_of(Conversation(messages=tuple(Message(*turn) for turn in turns)))


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


LONG = "This is a first sentence that is long enough to be one. "


@pytest.mark.parametrize(
    "answer",
    [
        LONG + "And then the man went to the shop at the corner to buy some",
        LONG + "There are many kinds of these, for example apples, pears,",
        LONG + "It was in those days that he had met the",
        "The first line of this answer is a whole sentence of prose.\n\n"
        "The second one stops right in the middle because tokens",
        "这是第一句话，它说明了很多事情。然后第二句话还没有说完就在这里突然中断了因为长度",
    ],
)
def test_cut_answers_are_found(answer):
    (detail,) = row_checks.cut_answer(pair(answer))
    assert detail.startswith('ends with "')


@pytest.mark.parametrize(
    "answer",
    [
        LONG + "And this is the end of it.",
        LONG + "“That is what he said to all of them on that day.”",
        LONG + "Good luck with everything that you will do from now on 🎉",
        "Here is a list of all the things that you will need:\n\n"
        "- a large bowl that holds all of the flour you have\n- a spoon with a long handle for the hot soup",
        "1. Open the door with the key that you were given before\n2. Close the door with the key that you were given after",
        "Here is the code that you asked for, as a function in Python:\n\n```python\nreturn the value of all\n```",
        "function add(first, second, third, fourth, fifth) {\n  return first + second + third + fourth + fifth;\n}",
        LONG + "The answer is therefore option C",
        LONG + "You will find all about it at the address https://example.org/a/long/path",
        LONG + "\n\nYours sincerely,\nJohn Smith",
        "Shall I compare thee to a summer's day that was\nThou art more lovely and more temperate than all the\n"
        "rough winds do shake the darling buds of May",
        "Two roads diverged in a yellow wood and I was sorry\nThat I could not travel both and be one traveller long\n"
        "I stood and looked down one as far as I could",
        '"Friendship is born at that moment when one man says to another: What! You too?" - C. S. Lewis',
        LONG + "We love our dog more than anything else in the world #PuppyLove",
        "#### 72",
        "positive",
        "这是第一句话，它说明了很多事情。这是第二句话，它也已经说完了。",
        LONG + "So 3 * 4 + 5 * 6 is, as we said above, 42",
        '{"name": "a long value in JSON that is more than eight words long"}',
    ],
)
def test_whole_answers_are_not_cut(answer):
    assert row_checks.cut_answer(pair(answer)) == []


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with this request.",
        "I apologize, but I am unable to provide that information.",
        "Sorry, I can't comply with that.",
        "I cannot fulfill your request.",
        "I can't help with that.",
        "I'm sorry, but I'm unable to perform external tasks.",
        "I won't assist with this.",
        "I’m not able to help.",
        "I'm sorry, but as an AI, I don't have the capability to order a pizza.",
        "Unfortunately, I can't provide medical advice.",
        "很抱歉，我无法提供这样的信息。",
    ],
)
def test_refusals_are_found(answer):
    assert row_checks.refusal(pair(answer))


@pytest.mark.parametrize(
    "answer",
    [
        "I can't make it to the party, he said.",
        "I'm sorry to hear that. Try to restart the router first.",
        "Sorry for the delay! The parcel left yesterday.",
        'He answered: "I cannot help you with that", and left.',
        "I cannot recommend this book enough.",
        "Unfortunately, the train was late and I missed the meeting.",
        "I'm sorry that I forgot your birthday; I can give you the present today.",
        "You can't divide by zero.",
        "I apologize, but I could not book the restaurant. Could I assist you with anything else?",
    ],
)
def test_what_only_sounds_like_a_refusal_is_none(answer):
    assert row_checks.refusal(pair(answer)) == []


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I have no feelings.",
        "Well, as an AI, I do not eat.",
        "I am an AI language model.",
        "作为一个AI语言模型，我没有感情。",
    ],
)
def test_boilerplate_is_found(answer):
    assert row_checks.boilerplate(pair(answer))


@pytest.mark.parametrize(
    "answer",
    ["A language model predicts the next word.", "She works as an AI researcher.", "GPT-2 is used as a language model here."],
)
def test_talk_about_models_is_no_boilerplate(answer):
    assert row_checks.boilerplate(pair(answer)) == []


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
    assert row_checks.repeats_prompt(pair("I has a dog.", "Correct the sentence: I has a dog.")) == []


@pytest.mark.parametrize(
    "text",
    [
        "Fine.<|im_end|>", "<|im_start|>assistant\nFine.", "Fine.</s>", "<s>Fine.", "[INST] Hello [/INST] Fine.",
        "<<SYS>> x <</SYS>>",
        "Fine.\n### Response:\nYes", "Fine.\n\nHuman: And now?", "<start_of_turn>model\nFine.", "Fine.<|eot_id|>",
        "Fine.<|endoftext|>",
        "Assistant: Fine.", "<｜Assistant｜>Fine.", "Fine.\nUSER: And?",
    ],
)  # fmt: skip
def test_template_markup_is_found(text):
    assert row_checks.template_markup(pair(text))


@pytest.mark.parametrize(
    "text",
    [
        "ChatML ends a turn with `<|im_end|>`.", "```\n<|im_start|>user\nHi<|im_end|>\n```",
        "<s>old price</s> new price", "a < b and b > c",
        "[1] Smith et al.", "### Instructions for use\nStir.", "The human: a short history", "He is my assistant: a friend.",
        "<html><body>[INSTALL]</body></html>", "if (a <b| c> d) {}", "Humans: 3, dogs: 4",
    ],
)  # fmt: skip
def test_what_only_looks_like_markup_is_none(text):
    assert row_checks.template_markup(pair(text)) == []


HOSTILE = [
    "a" * 1_000_000, "a " * 500_000, "1 " * 500_000, "1" * 1_000_000, "@" * 1_000_000, "a@" * 500_000,
    "a.b@c." * 170_000, "`" * 1_000_000,
    "```\n" * 250_000, "<" * 1_000_000, "<|" * 500_000, "\n" * 1_000_000, " " * 1_000_000, "Ã" * 1_000_000,
    "â€" * 500_000, "AB12 " * 200_000,
    "-----BEGIN PRIVATE KEY-----" * 37_000, "eyJaaaaaaaaaaaa." * 62_000, "sorry " * 166_000,
    "i'm sorry, i cannot " * 50_000, "sk-" * 333_000,
    "<s>" * 333_000, "as an ai " * 111_000, "\u0301" * 500_000, "- " * 500_000, "~~~ `" * 200_000, "我" * 1_000_000,
    "$\\{}" * 250_000,
]  # fmt: skip


@pytest.mark.parametrize("text", [*HOSTILE[::3], *slow(*(text for number, text in enumerate(HOSTILE) if number % 3))], ids=lambda text: ascii(text[:12]))
def test_hostile_text_of_a_megabyte_takes_linear_time(text):
    texts = pair(text, text)
    for kind, check in ROW_CHECKS.items():
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
    for check in (row_checks.empty_answer, row_checks.role_order, row_checks.cut_answer, row_checks.one_word_answer):
        assert check(texts) == []
    assert row_checks.empty_answer(_calling(_ASKED, _CALL)) == row_checks.cut_answer(_calling(_ASKED, _CALL)) == []
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
