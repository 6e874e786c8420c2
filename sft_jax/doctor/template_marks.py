"""Marks of chat templates in content: the template would write them a second time, and a tokenizer makes none of them a turn.

Tags of reasoning and of calls of tools (`<think>`, `<tool_call>`) are none: data hold them by right, for templates that expect them
in the content. Patterns have bounded repetition: a hostile row of megabytes takes linear time.
"""

import json
import re
from pathlib import Path

from sft_jax.doctor.personal_data import snippet
from sft_jax.doctor.texts import Texts, contents

_WINDOW = 100_000  # characters of a text with code that are looked at
_CODE = re.compile(r"(?:```|~~~).{0,100000}?(?:```|~~~)|`[^`\n]{1,200}`", re.DOTALL)
_MARKS = re.compile(
    r'<\|["/\w][^\s<>|]{0,39}\|>|<\|"\|>'  # <|im_start|>, of most models
    r"|<\|\w{1,30}>|<\w{1,30}\|>"  # <|turn> and <turn|>
    r"|<｜[^｜\n]{1,40}｜>"
    r"|<(?:start|end|begin)_of_\w{1,20}>|<(?:bos|eos|pad|sop|eop|用户)>|\[gMASK\]"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT)\]|\[CALL_ID\]|<</?SYS>>"
    r"|^###\s?(?:Instruction|Response|Human|Assistant|Input):|^Human: ?|(?:^|[.!?] |</s> ?)(?:ASSISTANT|USER): ?"
    r"|\A\s{0,20}Assistant: ",
    re.MULTILINE,
)
_NEEDED = ("<", "[", "###", "Human:", "ASSISTANT:", "USER:", "Assistant:")  # one of these is in every text that holds a mark
_STRIKE = re.compile(r"</?s>")  # the end of a document, and in HTML what is struck through
_STRUCK = re.compile(r"</s>\s{0,20}\S")
BY_RIGHT = re.compile(  # what templates write and content may hold
    r"</?(?:think|tool_call|tool_response|tools?|function|functions|parameters?|arg_key|arg_value|response|results|co|name|type"
    r"|description|IMPORTANT)>|</?s>|\[/?THINK\]|\[IMG\]|\[ARGS\]"
)
_TOKEN = re.compile(r"<[^\s<>]{1,60}>|\[[^\s\[\]]{1,60}\]")


def template_markup(texts: Texts) -> list[str]:
    """Finds the marks with which chat templates part turns, outside of code."""
    for text in contents(texts):
        if not any(mark in text for mark in _NEEDED):
            continue
        text = _without_code(text)
        found = _MARKS.search(text)
        place, mark = (found.start(), found[0]) if found else _document_end(text)
        if mark:
            return [f"{mark.strip()} in {snippet(text[max(0, place - 20) :])}"]
    return []


def control_tokens(texts: Texts, tokens: frozenset[str]) -> list[str]:
    """Finds special tokens of a model in the content, outside of code."""
    for text in contents(texts) if tokens else ():
        if "<" not in text and "[" not in text:
            continue
        text = _without_code(text)
        for found in _TOKEN.finditer(text):
            if found[0] in tokens:
                return [f"{found[0]}, a special token of the model, in {snippet(text[max(0, found.start() - 20) :])}"]
    return []


def control_tokens_of(model_path: str) -> frozenset[str]:
    """Returns the special tokens of a model that content has no right to, by its tokenizer.json; none where there is no such file."""
    file = Path(model_path).expanduser() / "tokenizer.json"
    if not model_path or not file.is_file():
        return frozenset()
    try:
        added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        names = [token["content"] for token in added if token["special"]]
    except (OSError, ValueError, KeyError, TypeError):  # whoever needs the tokenizer tells what is wrong with it
        return frozenset()
    return frozenset(name for name in names if _TOKEN.fullmatch(name) and not BY_RIGHT.fullmatch(name))


def _without_code(text: str) -> str:
    return _CODE.sub(" ", text[:_WINDOW]) if "`" in text or "~~~" in text else text


def _document_end(text: str) -> tuple[int, str]:
    """Returns where <s> or </s> is the begin or the end of a document: unlike what HTML strikes through, it has no partner."""
    is_open = False
    for tag in _STRIKE.finditer(text):
        if tag[0] == "</s>" and not is_open:
            return tag.start(), tag[0]
        is_open = tag[0] == "<s>"
        if is_open and tag.start() <= 20 and not text[: tag.start()].strip() and not _STRUCK.search(text, tag.end()):
            return tag.start(), tag[0]
    return 0, ""
