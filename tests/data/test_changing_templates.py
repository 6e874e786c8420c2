"""Templates that render a turn otherwise once others follow it."""

import pytest
from built_rows import build, chat, texts_of

from sft_jax.data.chats.chat import RowBuilder, build_rows
from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.formats.conversation import Conversation, Message


def test_thinking_is_trained_in_every_turn(qwen, stock):
    """Qwen3 drops the thinking of earlier turns, so every turn is an example of its own."""
    thoughts = chat("a", "<think>\nwhy\n</think>\n\nb", "c", "<think>\nhow\n</think>\n\nd")
    fields = Conversation(
        messages=(
            Message("user", "a"),
            Message("assistant", "b", reasoning="why"),
            Message("user", "c"),
            Message("assistant", "d", reasoning="how"),
        )  # fmt: skip
    )
    rows = build(qwen, stock["Qwen-Qwen3-0.6B"], thoughts, fields)
    for row in rows:
        assert (row.kind, row.counts) == ("per_turn", {"per_turn": 2})
        assert texts_of(qwen, row) == [
            (0, ["<think>\nwhy\n</think>\n\nb<|im_end|>"]), (1, ["<think>\nhow\n</think>\n\nd<|im_end|>"]),
        ]  # fmt: skip
        assert "why" not in qwen.decode(row.examples[1].ids)


def test_template_arguments(qwen, stock):
    off = {"enable_thinking": False}
    (row,) = build(qwen, stock["Qwen-Qwen3-0.6B"], chat("a", "b"), template_kwargs=off)
    assert (row.kind, texts_of(qwen, row)) == ("once", [(-1, ["b<|im_end|>"])])
    assert "<think>\n\n</think>" in qwen.decode(row.examples[0].ids)
    (row,) = build(qwen, stock["Qwen-Qwen3-0.6B"], chat("a", "<think>\nx\n</think>\n\nb"), template_kwargs=off)
    assert texts_of(qwen, row) == [(0, ["b<|im_end|>"])]  # the prompt has closed the section
    assert row.counts["reasoning_dropped"] == 1


@pytest.mark.parametrize(
    ("name", "kwargs", "answer", "text", "count"),
    [
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", {}, "<think>\nx\n</think>\n\nb", "x\n</think>\n\nb{end}", None),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", {}, "<think>x</think>b", "x</think>b{end}", None),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", {}, "x\n</think>\n\nb", "x\n</think>\n\nb{end}", None),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", {}, "b", "b{end}", "open_thinking"),
        ("deepseek-ai-DeepSeek-V3.1", {}, "<think>x</think>b", "b{end}", "reasoning_dropped"),
        ("deepseek-ai-DeepSeek-V3.1", {"thinking": True}, "<think>x</think>b", "x</think>b{end}", None),
        ("Qwen3.5-4B", {}, "b", "\n</think>\n\nb<|im_end|>", None),
        ("Qwen3.5-4B", {}, "<think>\nx\n</think>\n\nb", "x\n</think>\n\nb<|im_end|>", None),
        ("openai-gpt-oss-120b", {}, "b", "<|channel|>final<|message|>b<|return|>", None),
        ("google-gemma-4-31B-it", {}, " b ", "b<turn|>", None),
        ("microsoft-Phi-3.5-mini-instruct", {}, "b", "b<|end|>", None),
    ],
)
def test_answers_of_templates_that_think(qwen, stock, name, kwargs, answer, text, count):
    (row,) = build(qwen, stock[name], chat("a", answer), template_kwargs=kwargs)
    text = text.format(end="<｜end▁of▁sentence｜>")
    assert [stretch.rstrip("\n") for _, (stretch,) in texts_of(qwen, row)] == [text]
    assert (count is None and not set(row.counts) - {"per_turn", "seam_cuts"}) or row.counts[count] == 1


def test_an_end_of_turn_that_is_the_head_of_the_next_message(qwen):
    source = (
        "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    (row,) = build(qwen, source, chat("a", "b", "c", "d"))
    assert texts_of(qwen, row) == [(-1, [" b<|im_start|>", " d<|im_start|>"])]
    assert row.counts == {"end_added": 2}
    builder = RowBuilder(qwen, ChatTemplate(source, qwen.special_tokens))
    assert builder.end_of_turn == "<|im_start|>"


def test_a_template_without_any_end_of_turn_gets_eos(qwen):
    source = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    (row,) = build(qwen, source, chat("a", "b", "c", "d"))
    assert texts_of(qwen, row) == [(0, [" b<|im_end|>"]), (1, [" d<|im_end|>"])]


def test_the_system_prompt_that_moves_to_the_last_user_turn(qwen, stock):
    messages = (Message("system", "Be brief."), *chat("a", "b", "c", "d").messages)
    source = stock["mistralai-Mistral-Nemo-Instruct-2407"]
    template = ChatTemplate(source, {"bos_token": "", "eos_token": "<|im_end|>"})
    (row,) = build_rows([Conversation(messages=messages)], qwen, template)
    assert [qwen.decode(example.ids) for example in row.examples] == [
        "[INST]Be brief.\n\na[/INST]b<|im_end|>",
        "[INST]a[/INST]b<|im_end|>[INST]Be brief.\n\nc[/INST]d<|im_end|>",
    ]
    assert texts_of(qwen, row) == [(0, ["b<|im_end|>"]), (1, ["d<|im_end|>"])]
