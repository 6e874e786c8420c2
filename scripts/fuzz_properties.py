"""What has to hold for any row and any file: examples that can be trained on, or an error that says why."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.config import ColumnsConfig
from sft_jax.data.chats.chat import COUNTS, RowBuilder
from sft_jax.data.chats.locate import REASONING_TAGS
from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate
from sft_jax.data.examples import BadRow, BuiltRow, RowError
from sft_jax.data.formats.conversation import Conversation
from sft_jax.data.formats.detection import detect_format
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.sources.registry import open_rows
from sft_jax.data.tokenizers.tokens import Tokenizer, load_tokenizer
from sft_jax.errors import UserError

LONGEST_MESSAGE = 20_000  # characters of an error: rows are long, what is said about them is not


class Builder(NamedTuple):
    """One way to make examples."""

    name: str
    rows: RowBuilder
    tokenizer: Tokenizer


def builders(assets: Path) -> list[Builder]:
    """Returns the ways to make examples that are tried: published templates with tokenizers that have their markers."""
    stock = {path.stem: path.read_text() for path in (assets / "chat_templates" / "stock").glob("*.jinja")}
    folder = assets / "tokenizers"
    qwen, llama2 = load_tokenizer(folder / "qwen3"), load_tokenizer(folder / "llama2")
    llama3 = load_tokenizer(folder / "llama3")
    oss = load_tokenizer(folder / "llama3", ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"])
    mistral = load_tokenizer(folder / "mistral_v3" / "tokenizer.model")
    pairs = [
        ("chatml", qwen, TEMPLATES["chatml"], "assistant"), ("qwen3", qwen, stock["Qwen-Qwen3-0.6B"], "assistant"),
        ("qwen3 all", qwen, stock["Qwen-Qwen3-0.6B"], "all"), ("llama3", llama3, stock["meta-llama-Llama-3.1-8B-Instruct"], "assistant"),
        ("gpt-oss", oss, stock["openai-gpt-oss-120b"], "assistant"), ("mistral", mistral, stock["mistralai-Mistral-Nemo-Instruct-2407"], "last"),
        ("plain", llama2, None, "assistant"), ("alpaca", llama2, TEMPLATES["alpaca"], "assistant,user"),
    ]  # fmt: skip
    return [
        Builder(name, RowBuilder(tokenizer, source and ChatTemplate(source, tokenizer.special_tokens, name=name), supervise=supervise), tokenizer)
        for name, tokenizer, source, supervise in pairs
    ]


def check_message(message: str) -> None:
    """Raises AssertionError for a message that cannot be printed, or that is as long as a row."""
    assert message.strip(), "an error says nothing"
    assert len(message) <= LONGEST_MESSAGE, f"an error of {len(message)} characters: {message[:200]!r}"
    try:
        message.encode()
    except UnicodeEncodeError as error:
        raise AssertionError(f"an error cannot be printed: {message[:200]!r}") from error


def check_row(row: BuiltRow | BadRow, tokenizer: Tokenizer) -> None:
    """Raises AssertionError for examples that cannot be trained on as they are."""
    if isinstance(row, BadRow):
        check_message(row.reason)
        return
    assert row.examples and set(row.counts) <= set(COUNTS) and row.kind in ("once", "cut", "per_turn", "plain"), row
    for example in row.examples:
        ids, weights = example.ids, example.weights
        assert ids.dtype == np.int32 and weights.dtype == np.float32 and ids.shape == weights.shape and ids.ndim == 1, example
        assert 0 <= ids.min() and ids.max() < tokenizer.vocab_size, example
        assert np.isfinite(weights).all() and (weights >= 0).all() and weights[0] == 0 and weights.any(), example
        starts = example.turn_starts
        assert len(starts) == len(example.turn_roles) and (np.diff(starts) >= 0).all(), example
        assert not len(starts) or 0 <= starts[0] and starts[-1] <= len(ids), example
        assert -1 <= example.turn < max(1, example.turn_roles.count("assistant")), example


def check_guard(row: BuiltRow | BadRow, conversation: Conversation, builder: Builder) -> None:
    """Raises AssertionError where a chat has other control tokens than one whose contents have none of their texts."""
    if isinstance(row, BadRow) or not row.counts.get("guarded") or conversation.kind != "chat":
        return
    reasoning = {tag for pair in REASONING_TAGS for tag in pair}
    texts = sorted((text for text in builder.tokenizer.added_tokens if text.strip()), key=len, reverse=True)
    texts = [text for text in texts if text not in reasoning]
    pattern = re.compile("|".join(map(re.escape, texts)))
    messages = []
    for message in conversation.messages:
        if message.calls or message.pieces or any(tag in message.content + (message.reasoning or "") for tag in reasoning):
            return
        changed = {name: pattern.sub("x", value) for name in ("content", "reasoning") if (value := getattr(message, name))}
        messages.append(replace(message, **changed))
    (neutral,) = builder.rows.build([replace(conversation, messages=tuple(messages))])
    if isinstance(neutral, BadRow) or len(neutral.examples) != len(row.examples):
        return
    control = np.array(sorted(builder.tokenizer.added_tokens[text] for text in texts))
    for mine, other in zip(row.examples, neutral.examples, strict=True):
        counts = [np.isin(example.ids, control).sum() for example in (mine, other)]
        assert counts[0] == counts[1], f"{counts[0]} control tokens where there should be {counts[1]}: {mine.text!r}"



def try_rows(rows: list[dict[str, Any]], builder: Builder, columns: ColumnsConfig) -> Counter[str]:
    """Takes rows through all formats that they have, and the examples of them; returns what came out.

    Raises AssertionError, or whatever else was raised, for what may not come out.
    """
    outcomes: Counter[str] = Counter()
    conversations = []
    for row in rows:
        fitting = [form for form in FORMATS.values() if form.has_fields(row, columns)]
        if not fitting:
            outcomes["no format"] += 1
            fitting = [FORMATS["messages"]]
        for form in fitting:
            misfit = form.misfit(row, columns)
            if misfit:
                check_message(misfit)
            try:
                conversation = form.read(row, columns)
            except RowError as error:
                check_message(str(error))
                outcomes[f"error: {kind_of_error(str(error))}"] += 1
                continue
            for name in form.unread_fields(row, columns):
                name.encode()
            conversations.append(conversation)
    for conversation, built in zip(conversations, builder.rows.build(conversations), strict=True):
        check_row(built, builder.tokenizer)
        check_guard(built, conversation, builder)
        if isinstance(built, BadRow):
            outcomes[f"bad: {kind_of_error(built.reason)}"] += 1
        else:
            outcomes[f"built {built.kind}"] += 1
            outcomes["examples"] += len(built.examples)
            outcomes.update({f"count {name}": 1 for name in built.counts})
    return outcomes


def kind_of_error(message: str) -> str:
    """Returns a message without what it quotes, so that messages of one kind are the same."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"|\w*\[[^\]]*\][\w.]*", "_", message[:2000])
    return re.sub(r"-?\d[\d.,e+-]*|\bnan\b|\binf\b", "N", message).split(";")[0][:70]


def try_file(path: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Reads a file; returns its rows and what came out. Raises whatever may not come out."""
    outcomes: Counter[str] = Counter()
    try:
        rows = open_rows([str(path)], "data.train")
        found = rows.read(0, len(rows))
    except UserError as error:
        check_message(str(error))
        outcomes["file refused"] += 1
        return [], outcomes
    try:
        outcomes[f"format {detect_format(rows, ColumnsConfig(), skip_bad_rows=True)}"] += 1
    except UserError as error:
        check_message(str(error))
        outcomes["no format of the file"] += 1
    good = []
    for number, row in enumerate(found):
        str(rows.where(number)).encode()
        if isinstance(row, RowError):
            check_message(str(row))
            outcomes[f"unreadable: {kind_of_error(str(row))}"] += 1
        else:
            good.append(row)
            outcomes["rows of files"] += 1
    return good, outcomes
