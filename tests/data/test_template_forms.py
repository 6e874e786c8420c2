"""Things that published templates do, in templates of our own: each was once refused, or supervised wrongly.

The reference is the render of transformers. Templates have the markers of Llama 3's tokenizer.
"""

import pytest
from chat_cases import reference_render, shared_tokenizer, template_classes_script

from sft_jax.data.chats.chat import RowBuilder
from sft_jax.data.chats.content_form import in_parts
from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.data.formats.tool_calls import Call

pytest.importorskip("transformers")

ASK, SUM = Message("user", "17 + 25?"), Message("assistant", "42.")
CALL = Message("assistant", "", calls=(Call("add", {"of": "17 and 25"}, '{"of": "17 and 25"}', "call00001"),))
RESULT = Message("tool", "42", call_id="call00001", name="add")


@pytest.fixture(scope="module")
def llama3(assets):
    return shared_tokenizer(assets / "tokenizers" / "llama3")


@pytest.fixture(scope="module")
def tokenizer(llama3):
    """Llama 3's with the markers of these templates."""
    return template_classes_script().with_markers(llama3, ["<|s|><|e|><|user|><|bot|><|think|><|call|></call|><|resp|>"])


def built(source, tokenizer, *messages):
    builder = RowBuilder(tokenizer, ChatTemplate(source, tokenizer.special_tokens))
    (row,) = builder.build([Conversation(messages=messages)])
    return row


def answers(row, tokenizer):
    """Returns (what is before, what is supervised) of each stretch of supervised tokens."""
    assert not isinstance(row, BadRow), row
    result = []
    for example in row.examples:
        supervised = [*(example.weights > 0), False]
        starts = [n for n in range(1, len(supervised)) if supervised[n] and not supervised[n - 1]]
        for start in starts:
            end = supervised.index(False, start)
            before = tokenizer.decode(example.ids[:start])
            result.append((before, tokenizer.decode(example.ids[:end])[len(before) :]))
    return result


def prompt_of(source, *messages):
    return reference_render(source, messages, True, {})


# A section of reasoning that the prompt opens, and that earlier turns show as closed or not at all.
SECTION = (
    "{% for m in messages %}{% if m.role == 'user' %}<|s|>user\n{{ m.content }}<|e|>\n{% else %}<|s|>bot\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}{% endif %}EMPTY{{ m.content }}<|e|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|s|>bot\nOPEN{% endif %}"
)


@pytest.mark.parametrize(
    ("opened", "empty", "answer"),
    [
        ("<think>", "</think>", "</think>42.<|e|>"),  # GLM 4.7
        ("<think>\n", "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}", "\n</think>\n\n42.<|e|>"),  # Qwen3-Next
        ("<think></think>", "<|resp|>", "<|resp|>42.<|e|>"),  # Command R7B
        ("<think>", "<|resp|>", "<|resp|>42.<|e|>"),  # Cohere 2 MoE: nothing closes it
    ],
)
def test_a_section_that_only_the_prompt_opens(opened, empty, answer, tokenizer):
    source = SECTION.replace("OPEN", opened).replace("EMPTY", empty)
    for messages in ((ASK, SUM), (ASK, SUM, ASK, SUM), (ASK, SUM, SUM)):
        row = built(source, tokenizer, *messages)
        turns = [number for number, message in enumerate(messages) if message.role == "assistant"]
        expected = [(prompt_of(source, *messages[:turn]), answer) for turn in turns]
        assert sorted(answers(row, tokenizer)) == sorted(expected), messages
        assert row.counts.get("open_thinking", 0) == (len(turns) if "</think>" not in opened + answer else 0)


def test_reasoning_where_the_prompt_has_closed_the_section(tokenizer):
    """It is left out and counted, with a call behind it too (Gemma 4, Laguna)."""
    source = (
        "{% for m in messages %}<|s|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n{% endif %}"
        "{% if m.role == 'assistant' %}</think>\n{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}</call|>{% endfor %}<|e|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|s|>assistant\n</think>{% endif %}"
    )
    for turn, answer in ((SUM, "\n42.<|e|>"), (CALL, '\n<|call|>add{"of": "17 and 25"}</call|><|e|>')):
        thought = Message("assistant", turn.content, reasoning="I add.", calls=turn.calls)
        row = built(source, tokenizer, ASK, thought)
        assert answers(row, tokenizer) == [(prompt_of(source, ASK), answer)]
        assert row.counts["reasoning_dropped"] == 1


def test_a_call_after_an_answer_begins_at_its_own_header(tokenizer):
    """Earlier answers begin with the same markup, which is not what the call begins with."""
    source = (
        "{% for m in messages %}<|s|>{{ m.role }}\n{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}</call|>{% endfor %}<|e|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|s|>assistant\n<think>{% endif %}"
    )
    row = built(source, tokenizer, ASK, SUM, ASK, CALL)
    expected = '</think><|call|>add{"of": "17 and 25"}</call|><|e|>'
    assert answers(row, tokenizer)[-1] == (prompt_of(source, ASK, SUM, ASK), expected)


def test_a_message_behind_every_call_is_no_part_of_the_answer(tokenizer):
    """Command R+ puts what asks for an answer there, and no end of the turn before it: refused, with both texts."""
    source = (
        "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% if m.tool_calls %}BEHIND{% endif %}<|e|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|s|>system\nNow act.<|e|>\n<|s|>assistant\n{% endif %}"
    )
    row = built(source.replace("BEHIND", "<|s|>system\nNow act."), tokenizer, ASK, CALL)
    assert isinstance(row, BadRow) and "Prompt: '<|s|>user" in row.reason and row.reason.count("Now act.") == 2
    hostile = Message("assistant", "", calls=(Call("add", {"of": "<|s|>"}, '{"of": "<|s|>"}', "call00001"),))
    assert answers(built(source.replace("BEHIND", ""), tokenizer, ASK, hostile), tokenizer)


def test_calls_whose_result_goes_on_in_the_turn(tokenizer):
    """The marker behind them is what a server stops at, and no end is added (Apertus)."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first %}<|e|>{% endif %}<|user|>{{ m.content }}{% elif m.role == 'tool' %}[{{ m.content }}]"
        "{% else %}{% if messages[loop.index0 - 1].role == 'user' %}<|bot|>{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}</call|>{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    row = built(source, tokenizer, ASK, CALL, RESULT, SUM)
    assert [answer for _, answer in answers(row, tokenizer)] == ['<|call|>add{"of": "17 and 25"}</call|>', "42.<|e|>"]
    assert row.counts["end_added"] == 1


def test_an_empty_answer_of_which_nothing_is_rendered_is_refused(tokenizer):
    """Seed-OSS writes neither the line feed nor the end of such a turn."""
    source = (
        "{% for m in messages %}<|s|>{{ m.role }}{% if m.content %}\n{{ m.content }}<|e|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
    )
    row = built(source, tokenizer, ASK, Message("assistant", ""))
    assert isinstance(row, BadRow) and repr(prompt_of(source, ASK)) in row.reason and "conversation: '<|s|>user" in row.reason


def test_an_answer_is_not_found_in_markup(tokenizer):
    """A template that loses the answer loses it where its text is a part of a marker too."""
    source = "{% for m in messages %}<|user|>{{ m.content if m.role == 'user' }}<|e|>{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
    row = built(source, tokenizer, ASK, Message("assistant", "e"))
    assert isinstance(row, BadRow) and "changes the answer: message 1 is 'e'" in row.reason


def test_contents_are_given_as_parts_where_text_is_lost(tokenizer):
    """As servers do for Idefics, SmolVLM and LLaVA."""
    source = (
        "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|e|>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    from transformers.utils.chat_template_utils import render_jinja_template

    asked = in_parts([{"role": "user", "content": "17 + 25?"}])
    (prompt,), _ = render_jinja_template([asked], chat_template=source, add_generation_prompt=True)
    row = built(source, tokenizer, ASK, SUM)
    assert row.kind == "once" and answers(row, tokenizer) == [(prompt, "42.<|e|>")]
    row = built(source, tokenizer, Message("user", "<|e|> is text"), SUM)
    assert row.counts["guarded"] == 1 and len(answers(row, tokenizer)) == 1


@pytest.mark.parametrize("special", [True, False])
def test_only_a_special_token_of_the_next_header_ends_a_turn(special, tokenizer):
    """GLM stops at `<|user|>`; MiniCPM's `<用户>`, which is not special, is nothing that the model writes."""
    source = "{% for m in messages %}{{ '<|user|>' + m.content + '<|bot|>' if m.role == 'user' else m.content }}{% endfor %}"
    values, files = tokenizer.state()
    kept = [text for text in values["special_added_tokens"] if special or text != "<|user|>"]
    other = type(tokenizer).from_state({**values, "special_added_tokens": kept}, files)
    row = built(source, other, ASK, SUM)
    assert [answer for _, answer in answers(row, other)] == ["42." + ("<|user|>" if special else "</s>")]
    assert row.counts["end_added"] == 1
