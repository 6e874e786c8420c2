"""Marks of chat templates are found in content, what only looks like them is not."""

import pytest
from doctor_data import pair

from sft_jax.doctor.template_marks import template_markup


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
    assert template_markup(pair(text))


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
    assert template_markup(pair(text)) == []
