"""Rows with one thing of millions: each is done or stopped, and named; the others are done."""

import base64
import datetime
import random

import pytest
from chat_cases import shared_tokenizer

from sft_jax.config import ColumnsConfig
from sft_jax.data.chats.templates import TEMPLATES
from sft_jax.data.stores.row_builder import TARGET, Item, SetOptions, Setup
from sft_jax.data.stores.workers import Failure, WorkerPool
from sft_jax.data.tokenizers.tokens import store_tokenizer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}


def chat(content, **fields):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content, **fields}]}


def long_rows(size: int) -> dict[str, dict]:
    """Rows of about `size` characters."""
    return {
        "letters": chat("a" * size),
        "spaces": chat(f"x{' ' * size}y"),
        "line feeds": chat("x" + "\n" * size + "y"),
        "emoji": chat("👩‍👩‍👧" * (size // 5)),
        "base64": chat(base64.b64encode(random.Random(0).randbytes(size * 3 // 4)).decode()),
        "accents": chat("e" + "\u0301" * size),
        "signs": chat("<" * size),
        "control tokens": chat("</s>" * (size // 4)),
        "thinking": chat("<think>" * (size // 7)),
        "calls": chat(None, tool_calls=[CALL] * (size // 100)),
        "arguments": chat(None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": dict.fromkeys(map(str, range(size // 20)), "")}}]),
        "parts": chat([{"type": "text", "text": "a", "weight": 0.5}] * (size // 10)),
        "tools": {**chat("x"), "tools": [{"name": f"f{number}"} for number in range(size // 100)]},
        "turns": {"messages": [{"role": ("user", "assistant")[index % 2], "content": "hi"} for index in range(size // 100)]},
    }


def check(tmp_path, assets, rows: dict[str, dict], timeout: float) -> None:
    store_tokenizer(shared_tokenizer(assets / "models" / "stories260k"), tmp_path)
    sets = (SetOptions("messages", ColumnsConfig(), "assistant"),)
    setup = Setup(str(tmp_path), (TEMPLATES["chatml"], "chatml"), datetime.datetime(2026, 1, 1), {}, False, sets)
    items = [Item(0, number, row) for number, row in enumerate([chat("good"), *rows.values(), chat("good")])]
    outcomes = {}
    with WorkerPool(TARGET, setup, 1, timeout, 1024) as pool:
        for (item,), outcome in pool.run([item] for item in items):
            outcomes[item.number] = outcome
    assert list(outcomes) == list(range(len(items)))
    for number, outcome in outcomes.items():
        if isinstance(outcome, Failure):
            assert outcome.kind in ("timeout", "memory", "died") and 0 < number < len(items) - 1 and len(outcome.reason) < 500, outcome
        else:
            assert [bad[0] for bad in outcome.bad] == [number] or outcome.encoded.rows.tolist() == [number]


def test_long_rows_are_done_or_named(tmp_path, assets):
    check(tmp_path, assets, long_rows(20_000), 20.0)


@pytest.mark.slow
def test_very_long_rows_are_done_or_named(tmp_path, assets):
    check(tmp_path, assets, long_rows(10_000_000), 10.0)
