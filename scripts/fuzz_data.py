"""Feeds the data path with broken rows and broken files: each has to become examples, or an error that says why.

    python scripts/fuzz_data.py --assets ../shared/assets --rows 1000000 --seed 1

Real rows are changed at random and go through every format, template and tokenizer that is here; now and then a file of
them is broken too and read. Prints a line of JSON every ten seconds and a summary. What is neither an example nor an error
of its row (another exception, a row that takes too long, an example that cannot be trained on, a message that cannot be
printed, memory that grows) ends with exit code 1; what was found lies in --failures, one file for each kind.
"""

import argparse
import contextlib
import copy
import csv
import gc
import gzip
import hashlib
import io
import json
import math
import pickle
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet

from sft_jax.config import ColumnsConfig
from sft_jax.data.chat import COUNTS, RowBuilder
from sft_jax.data.conversation import Conversation
from sft_jax.data.examples import BadRow, BuiltRow, RowError
from sft_jax.data.formats import FORMATS
from sft_jax.data.locate import REASONING_TAGS
from sft_jax.data.sources import open_rows
from sft_jax.data.templates import TEMPLATES, ChatTemplate
from sft_jax.data.tokens import Tokenizer, load_tokenizer
from sft_jax.errors import UserError

LONGEST_MESSAGE = 20_000  # characters of an error: rows are long, what is said about them is not
KINDS_COUNTED = 300  # kinds of errors that are told apart

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


def break_bytes(data: bytes, choose: random.Random) -> bytes:
    """Returns bytes of a file with a few of them changed, removed, repeated or cut off."""
    broken = bytearray(data)
    for _ in range(choose.randrange(1, 6)):
        place = choose.randrange(len(broken) + 1)
        kind = choose.randrange(6)
        if kind == 0:
            broken[place : place + 1] = choose.randbytes(choose.randrange(4))
        elif kind == 1:
            broken[place : place + choose.randrange(40)] = b""
        elif kind == 2:
            broken[place:place] = broken[max(0, place - 30) : place]
        elif kind == 3:
            broken[place:place] = choose.choice([b"\xff", b"\x00", b'"', b"\n", b"\r", b"{", b"[" * 120, b"\\ud800", b",", b"9" * 5000, b"\xef\xbb\xbf"])
        elif kind == 4 and choose.random() < 0.3:
            del broken[place:]
        elif broken and place < len(broken):
            broken[place] ^= 1 << choose.randrange(8)
    return bytes(broken)


def seed_rows(assets: Path) -> list[dict[str, Any]]:
    """Returns rows of the data sets in the assets, and SHAPES, in about equal parts of each kind."""
    found: list[list[dict[str, Any]]] = [SHAPES * 5]
    for path in sorted((assets / "datasets").rglob("*.json*")):
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()[:100]]
        found.append([row for row in rows[:60] if len(json.dumps(row)) < 8000])
    return [row for rows in found for row in rows]


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
        messages.append(_with(message, **changed))
    (neutral,) = builder.rows.build([_with(conversation, messages=tuple(messages))])
    if isinstance(neutral, BadRow) or len(neutral.examples) != len(row.examples):
        return
    control = np.array(sorted(builder.tokenizer.added_tokens[text] for text in texts))
    for mine, other in zip(row.examples, neutral.examples, strict=True):
        counts = [np.isin(example.ids, control).sum() for example in (mine, other)]
        assert counts[0] == counts[1], f"{counts[0]} control tokens where there should be {counts[1]}: {mine.text!r}"


def _with(value: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(value, **changes)


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


def _json_lines(rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=True, default=str).encode() + b"\n" for row in rows)


def _csv(rows) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows({name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in row.items()} for row in rows)
    return text.getvalue().encode(errors="surrogatepass")


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


def _table(rows) -> pa.Table:
    return pa.table({"text": [json.dumps(row, default=str) for row in rows], "messages": [[{"role": "user", "content": "é"}]] * len(rows)})


def _parquet(rows) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(_table(rows), sink, row_group_size=4)
    return sink.getvalue()


def _arrow(rows) -> bytes:
    sink = io.BytesIO()
    table = _table(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FILES: dict[str, Callable[[list], bytes]] = {
    ".jsonl": _json_lines, ".json": lambda rows: json.dumps(rows, default=str).encode(), ".csv": _csv,
    ".jsonl.gz": lambda rows: gzip.compress(_json_lines(rows), 1), ".jsonl.zst": lambda rows: _zstd(_json_lines(rows)),
    ".csv.gz": lambda rows: gzip.compress(_csv(rows), 1), ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip


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


class TooLong(BaseException):
    """Some rows took longer than they may. No Exception, so that nothing takes it for an error of a template."""


@contextlib.contextmanager
def deadline(seconds: float):
    """Raises TooLong in what takes longer."""

    def stop(*_):
        raise TooLong(f"took longer than {seconds:g} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Findings:
    """What should not have come out, one file for each place in the code."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts: Counter[str] = Counter()

    def add(self, error: BaseException, data: Any) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "sft_jax" in frame.filename] or frames
        kind = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {str(error)[:120]}"
        kind = re.sub(r"\[\d+\]|\d{3,}|'.*", "_", kind)
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(kind.encode(errors="replace")).hexdigest()[:12]
            (self.folder / f"{name}.pickle").write_bytes(pickle.dumps(data))  # JSON has no bytes, and no half of a pair in UTF-8
            text = "".join(traceback.format_exception(error))
            (self.folder / f"{name}.txt").write_text(f"{text}\n{data!r}\n", errors="backslashreplace")


def fuzz(args: argparse.Namespace) -> dict[str, Any]:
    """Runs and returns the summary."""
    seeds, ways = seed_rows(args.assets), builders(args.assets)
    findings, totals, process = Findings(args.failures), Counter(), psutil.Process()
    begun = told = time.monotonic()
    done, slowest, memory = 0, 0.0, []
    folder = Path(tempfile.mkdtemp(prefix="fuzz_data_"))

    def attempt(rows: list, builder: Builder, columns: ColumnsConfig) -> None:
        nonlocal slowest
        before = time.process_time()
        try:
            with deadline(args.row_seconds * len(rows)):
                totals.update(try_rows(rows, builder, columns))
        except (Exception, TooLong) as error:
            if len(rows) > 1:
                for row in rows:
                    attempt([row], builder, columns)
            else:
                findings.add(error, {"row": rows[0], "builder": builder.name, "columns": columns})
        slowest = max(slowest, (time.process_time() - before) / len(rows))

    number = 0
    while done < args.rows and (not args.seconds or time.monotonic() - begun < args.seconds):
        choose = random.Random(f"{args.seed}/{number}")
        number += 1
        if number % 8 == 0:
            suffix = choose.choice(list(FILES))
            rows = [mutate(choose.choice(seeds), choose) if choose.random() < 0.3 else choose.choice(seeds) for _ in range(choose.randrange(1, 12))]
            data = FILES[suffix](rows)
            path = folder / f"rows{suffix}"
            path.write_bytes(break_bytes(data, choose) if choose.random() < 0.9 else data)
            try:
                with deadline(args.row_seconds):
                    rows, outcomes = try_file(path)
            except (Exception, TooLong) as error:
                findings.add(error, {"suffix": suffix, "bytes": path.read_bytes()})
                continue
            totals.update(outcomes)
        else:
            rows = [mutate(choose.choice(seeds), choose) for _ in range(args.batch)]
        if rows:
            columns = COLUMNS[0] if choose.random() < 0.7 else choose.choice(COLUMNS)
            attempt(rows, choose.choice(ways), columns)
        done += len(rows)
        if len(totals) > KINDS_COUNTED:
            rare = sorted((name for name in totals if ": " in name), key=totals.__getitem__)[: len(totals) - KINDS_COUNTED]
            totals["errors of rare kinds"] += sum(totals.pop(name) for name in rare)
        if time.monotonic() - told >= 10:
            told = time.monotonic()
            gc.collect()
            memory.append(process.memory_info().rss >> 20)
            progress = {"rows": done, "seconds": round(told - begun), "examples": totals["examples"], "found": sum(findings.counts.values()), "memory_mb": memory[-1]}
            print(json.dumps(progress), flush=True)
    half = memory[len(memory) // 2 :]
    grown = min(half[-3:]) - half[0] if len(half) > 5 else 0
    if grown > args.growth_mb:
        findings.counts[f"memory grew by {grown} MB over the second half"] += 1
    return {
        "rows": done, "seconds": round(time.monotonic() - begun), "seed": args.seed,
        "outcomes": dict(totals.most_common()), "slowest_row_cpu_seconds": round(slowest, 2),
        "peak_mb": max(memory, default=0), "grown_mb": grown, "found": dict(findings.counts),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with datasets, tokenizers and chat_templates")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long, 0 = after --rows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="rows that are built at once")
    parser.add_argument("--row-seconds", type=float, default=5.0, help="what a row may take on average")
    parser.add_argument("--growth-mb", type=int, default=300, help="what memory may grow by over the second half")
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"), help="folder for what was found")
    args = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)  # numbers that overflow
    summary = fuzz(args)
    print(json.dumps(summary, indent=1))
    sys.exit(bool(summary["found"]))


if __name__ == "__main__":
    main()
