"""Marks of chat templates are found in content, what only looks like them is not."""

import json
import pydoc
import re
import string
from pathlib import Path

import pytest
from doctor_data import configure, found, pair, row, rows
from make_template_classes import KWARGS, stock_templates
from row_files import write

from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.examples import RowError
from sft_jax.doctor.check import diagnose
from sft_jax.doctor.template_marks import BY_RIGHT, control_tokens_of, template_markup


@pytest.mark.parametrize(
    "text",
    [
        "Fine.<|im_end|>", "<|im_start|>assistant\nFine.", "Fine.</s>", "<s>Fine.", "[INST] Hello [/INST] Fine.",
        "<<SYS>> x <</SYS>>",
        "Fine.\n### Response:\nYes", "Fine.\n\nHuman: And now?", "<start_of_turn>model\nFine.", "Fine.<|eot_id|>",
        "Fine.<|endoftext|>",
        "Fine.<turn|>And", "Fine.<|turn>model", "Fine.<|return|> And", "a <|channel|>final<|message|> b", "Fine.<|start|>assistant",
        "Fine.<|observation|>x", "[gMASK]<sop>Fine.", "Fine.<|END_RESPONSE|>", "Fine.<|im_user|>user", "Be brief.[/SYSTEM_PROMPT] Fine.",
        "Fine.<|eot|>And", "<|header_start|>user", "Fine.<end_of_utterance>", "Fine.<pad><pad>", "Fine.<eos>", "<bos>Fine.",
        "Fine.</s>And now?", "Fine.</s><s>And", "Fine. USER: And?", "Fine.</s>USER: And?",
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
        "It costs <s>10</s> <s>9</s>", "<think>\nI see.\n</think>\nFine.", '<tool_call>\n{"name": "add"}\n</tool_call>',
        "classA <|--|> classB", "f <| g <| x |> h", "Dear [NAME], see [IMG] and [ARGS].", "a <-> b <=> c <|> d", "The USER: bob",
        "<html><body>[INSTALL]</body></html>", "if (a <b| c> d) {}", "Humans: 3, dogs: 4",
    ],
)  # fmt: skip
def test_what_only_looks_like_markup_is_none(text):
    assert template_markup(pair(text)) == []


# Placeholders in what templates tell a model, and a tag that is too common to tell anything.
PLACEHOLDERS = {
    "<args-dict>", "<args-json-object>", "<function-name>", "<function=...>", "<function=example_function_name>", "<AI>",
    "<parameter=example_parameter_1>", "<parameter=example_parameter_2>", "[Dict]", "[field]", "[idx]", "[json_key]",
}  # fmt: skip
_MARKER = re.compile(r"<{1,2}[|｜/]?[^\s<>'\"{}]{1,40}>{1,2}|<\|\"\|>|\[/?[A-Za-z_]{2,}\]")


def test_every_marker_of_every_template_is_found_in_the_middle_of_an_answer(assets):
    markers = {marker for source in stock_templates(assets).values() for marker in _MARKER.findall(source)}
    markers = {marker for marker in markers - PLACEHOLDERS if not BY_RIGHT.fullmatch(marker)}
    assert len(markers) > 90
    assert [marker for marker in sorted(markers) if not template_markup(pair(f"Fine. {marker} And more."))] == []


def test_what_every_template_writes_after_an_answer_is_found(assets):
    turns = [{"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."), ("user", "How?"), ("assistant", "Yes."))]
    missed, seen = [], 0
    for name, source in stock_templates(assets).items():
        template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
        try:
            text = template.render(turns, False, **KWARGS.get(name, {}))
        except RowError:
            continue
        seen += 1
        if not template_markup(pair(text[text.index("So.") :])):
            missed.append(name)
    assert seen > 60 and missed == []


def test_code_and_pages_hold_no_marks():
    """The standard library, and a page that describes it, as answers that are not in code blocks."""
    files = sorted(Path(string.__file__).parent.glob("*.py"))
    assert len(files) > 100
    pages = [pydoc.HTMLDoc().docmodule(module) for module in (string, json, pydoc)]
    texts = [*(file.read_text(encoding="utf-8", errors="replace") for file in files), *pages]
    assert [text[:80] for text in texts if template_markup(pair(text))] == []


def test_questions_about_numbers_hold_no_marks(assets):
    lines = (assets / "datasets/gsm8k/test.jsonl").read_text().splitlines()
    assert not any(template_markup(pair(each["answer"], each["question"])) for each in map(json.loads, lines))


def test_special_tokens_of_the_model_are_marks_too(tmp_path):
    names = {"<unused7>": True, "[MASK]": True, "<think>": True, "<s>": True, "<image>": False, "plain": True}
    added = [{"id": number, "content": name, "special": special} for number, (name, special) in enumerate(names.items())]
    write(tmp_path, "tokenizer.json", json.dumps({"added_tokens": added}))
    assert control_tokens_of(str(tmp_path)) == {"<unused7>", "[MASK]"} and control_tokens_of("org/none") == control_tokens_of("") == set()
    train = [row(seed, completion=f"It is {mark} here.") for seed, mark in enumerate([*names, "<unused8>", "<added>", "`<unused7>`"])]
    data = configure(tmp_path, [*rows(10, 50), *train], add_tokens=("<added>",)).data
    details = found(diagnose(data, model_path=str(tmp_path)), "template_markup")
    assert list(details) == [11, 12, 18]
    assert details[11] == '<unused7>, a special token of the model, in "It is <unused7> here."'
    assert list(found(diagnose(data), "template_markup")) == [18]
