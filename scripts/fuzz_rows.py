"""Rows for fuzzing: shapes that rows may have, real ones, and changes of both."""

import copy
import gzip
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_jax.config import ColumnsConfig

_CALL = {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"of": ["17", {"and": "25"}], "n": 2}}}
_TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}
# What no data set here has: parts with weights, calls of every form, tokens.
SHAPES: list[dict[str, Any]] = [
    {"messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "17 + "}, {"type": "text", "text": "25?", "weight": 0.5}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "42.", "weight": 2}]},
        {"role": "user", "content": "Sure?", "train": False}, {"role": "assistant", "content": "Yes.", "weight": 0.25},
    ]},
    {"tools": [_TOOL], "messages": [
        {"role": "user", "content": "17 + 25?"}, {"role": "assistant", "content": None, "tool_calls": [_CALL, _CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "call00001", "name": "add"}, {"role": "assistant", "content": "42."},
    ]},
    {"messages": [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "reasoning_content": "Let me think."},
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."},
    ], "chat_template_kwargs": {"enable_thinking": True}},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "function_call": '{"name": "f", "arguments": "{}"}'}]},
    {"prompt": "Hi ", "completion": "Hello", "system": "Be kind."},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
    {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["a", "b"]]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"a": "b"}}'},
                       {"from": "observation", "value": "1"}, {"from": "gpt", "value": "One."}], "tools": '[{"name": "f"}]'},
    {"text": "Once upon a time"},
    {"segments": [{"text": "2+2=", "label": False}, {"text": "4", "weight": 0.5}]},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
    {"input_ids": [5, 6, 7], "weights": [0, 0.5, 1]},
]  # fmt: skip
_TEXTS = [
    "", " ", "\n\n", "\x00", "\u200b", "\ufeff", "e\u0301", "👩‍👩‍👧", "\U00107ffc", "\U00107ffd", "\U00108000", "\U0010fffd",
    "\uf8ff", "\ue000", "\U000f0000", "\U000f8001", "\ud800", "\udfff", "a\ud83d", "ﬁ", "\r", "\u2028", "▁", "<0x0A>",
    "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|start_header_id|>", "[INST]", "[/INST]", "</s>", "<s>", "<unk>",
    "<|channel|>final<|message|>", "<|start|>assistant", "<|end|>", "<|return|>", "<|im_", "end|>", "<|endoftext|>",
    "<think>", "</think>", "[THINK]", "<|channel>", "<tool_call>", "</tool_call>", "<tool_response>", "[TOOL_CALLS]", "None",
    "{% for i in x %}", "{{ messages }}", "{%- generation %}", "probed value", "One?", "null", "[]", "{}", "[[", '{"name": 1}',
    '{"name": "f", "arguments": {"a": "b"}}', "NaN", "1e999", "assistant", "user", "system", "tool", "developer", "gpt", "human",
    "function_call", "function", "text", "tool_call", "reasoning", "call00001",
]  # fmt: skip
_NAMES = [
    "messages", "conversations", "role", "content", "from", "value", "prompt", "completion", "instruction", "input", "output",
    "history", "text", "segments", "label", "weight", "loss_weight", "train", "tools", "tool_calls", "function_call", "function",
    "name", "arguments", "parameters", "id", "type", "tool_call_id", "reasoning_content", "thinking", "reasoning", "system",
    "input_ids", "labels", "weights", "attention_mask", "chat_template_kwargs", "enable_thinking", "tools_in_user_message",
    "builtin_tools", "documents", "add_generation_prompt", "self", "bos_token", "messages ", "", "\ud800", "\n", "images", "k" * 300,
]  # fmt: skip
# Configurations of columns: what is renamed, and texts that expressions make.
COLUMNS = [
    ColumnsConfig(),
    ColumnsConfig(messages="conversations", role="from", content="value", roles={"human": "user", "gpt": "assistant"}),
    ColumnsConfig(prompt="{{ instruction }}{% if input %}\n{{ input | upper }}{% endif %}", completion="output"),
    ColumnsConfig(prompt="question", completion="{{ answer[:40] }}"),
    ColumnsConfig(text="{{ messages[0]['content'] }} {{ text | default('') }}"),
]


def random_value(choose: random.Random, depth: int = 0) -> Any:
    """Returns any value that a reader may hand on: those of JSON, and the bytes that are no text in Parquet."""
    kind = choose.randrange(14 if depth < 4 else 11)
    if kind == 0:
        return None
    if kind == 1:
        return choose.random() < 0.5
    if kind == 2:
        return choose.choice([0, -0.0, -1, 1, 0.5, 1e-7, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e300, math.nan, math.inf, -math.inf])
    if kind == 3:
        return choose.choice(_TEXTS) * choose.choice([1, 1, 1, 50])
    if kind == 4:
        return "".join(chr(choose.choice([choose.randrange(128), choose.randrange(0x3000), choose.randrange(0x110000)])) for _ in range(6))
    if kind == 5 and choose.random() < 0.03:  # deep, but not deeper than readers let pass
        deep: Any = "x"
        for _ in range(choose.choice([20, 90])):
            deep = [deep] if choose.random() < 0.5 else {choose.choice(_NAMES): deep}
        return deep
    if kind == 6 and choose.random() < 0.02:
        return choose.choice(["a", " ", "<", "\n", "ab ", "<|im_end|>", "é", "[", "1"]) * choose.choice([5_000, 20_000])
    if kind == 7 and choose.random() < 0.2:
        return b"\xff" + choose.randbytes(3)
    if kind < 11:
        return " ".join(choose.choice(_TEXTS) for _ in range(choose.randrange(5)))
    if kind < 12:
        return [random_value(choose, depth + 1) for _ in range(choose.randrange(4))]
    return {choose.choice(_NAMES): random_value(choose, depth + 1) for _ in range(choose.randrange(5))}


def _places(value: Any, parent: Any = None, key: Any = None) -> Iterator[tuple[Any, Any]]:
    if parent is not None:
        yield parent, key
    if isinstance(value, (dict, list)):
        for name, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _places(inner, value, name)


def mutate(row: dict[str, Any], choose: random.Random) -> dict[str, Any]:
    """Returns a copy of a row with a few changes at random places."""
    row = copy.deepcopy(row)
    for _ in range(choose.choice([0, 1, 1, 2, 3, 6])):
        places = list(_places(row))
        if not places:
            break
        parent, key = choose.choice(places)
        old, kind = parent[key], choose.randrange(12)
        if kind < 3:
            parent[key] = random_value(choose)
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, dict):
            parent[choose.choice(_NAMES)] = parent.pop(key)
        elif kind == 5 and isinstance(parent, dict):
            parent[choose.choice(_NAMES)] = random_value(choose)
        elif kind == 6 and isinstance(parent, list):
            parent.insert(choose.randrange(len(parent) + 1), copy.deepcopy(old))
        elif kind == 7 and isinstance(parent, list):
            choose.shuffle(parent)
        elif kind == 8:
            parent[key] = choose.choice([json.dumps(old, default=str), [old], {"text": old, "type": "text"}, str(old)])
        elif kind < 12 and isinstance(old, str):
            cut = choose.randrange(len(old) + 1)
            parent[key] = old[:cut] + choose.choice(_TEXTS) + old[choose.choice([cut, min(cut + 3, len(old))]) :]
        if kind == 6 and choose.random() < 0.02 and isinstance(parent, list):
            parent *= min(40, 120 // max(len(parent), 1)) or 1
    return row



def seed_rows(assets: Path) -> list[dict[str, Any]]:
    """Returns rows of the data sets in the assets, and SHAPES, in about equal parts of each kind."""
    found: list[list[dict[str, Any]]] = [SHAPES * 5]
    for path in sorted((assets / "datasets").rglob("*.json*")):
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()[:100]]
        found.append([row for row in rows[:60] if len(json.dumps(row)) < 8000])
    return [row for rows in found for row in rows]
