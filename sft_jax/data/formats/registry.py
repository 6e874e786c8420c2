"""FORMATS: what the fields of a row mean. A format reads a row into a Conversation, or says why it cannot.

Formats are tables of functions: a new one is a reader and an entry in FORMATS. `data.columns` gives fields other names.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from sft_jax.config import ColumnsConfig
from sft_jax.config_checks import check_template_arguments, is_expression
from sft_jax.data.examples import RowError, in_message
from sft_jax.data.formats.conversation import Conversation, Message, Piece
from sft_jax.data.formats.expressions import evaluate, fields_of
from sft_jax.data.formats.messages import LEAST, MOST, read_message, read_turn, text_of, unread_fields, weight_of
from sft_jax.data.formats.tool_calls import NOTHING, read_tools
from sft_jax.data.sources.json_rows import kind_of
from sft_jax.errors import UserError, did_you_mean

IGNORED = -100  # label of a token that is not supervised, as transformers has it
# Fields whose content would be lost: a row that has one is refused, not read without it.
UNSUPPORTED = {
    "tools": "tools", "functions": "tools", "tool_calls": "tool calls",
    "images": "images", "image": "images", "videos": "videos", "audios": "audio", "audio": "audio",
}  # fmt: skip


class Format(NamedTuple):
    """How rows of one format are recognised and read."""

    required: Mapping[str, str]  # name in data.columns -> standard name of the field
    optional: Mapping[str, str]
    reader: Callable[[dict[str, Any], Mapping[str, str]], Conversation]  # row, column -> field name
    turns: tuple[str, str] = ("", "")  # fields that every turn of a chat has: who speaks, and what
    turn_columns: tuple[str, ...] = ()  # of data.columns: what is written otherwise in turns
    own: tuple[str, ...] = ()  # further fields that the reader reads, which cannot be renamed

    def names(self, columns: ColumnsConfig) -> dict[str, str]:
        """Returns column -> name of the field in the rows."""
        return self._reading(columns).names

    def _reading(self, columns: ColumnsConfig) -> "_Reading":
        """Returns what is the same for all rows that are read with `columns`."""
        key = self.reader, _names_in(columns)
        found = _READINGS.get(key)
        if found is None:
            names = {column: getattr(columns, column) or name for column, name in {**self.required, **self.optional}.items()}
            fields = frozenset(field for name in names.values() for field in fields_of(name))
            expressions = tuple(name for name in names.values() if is_expression(name))
            found = _READINGS[key] = _Reading(names, fields, fields.union(self.own, UNSUPPORTED), expressions)
        return found

    def columns(self) -> tuple[str, ...]:
        """Returns the columns that a configuration may name."""
        return (*self.required, *self.optional, *self.turn_columns)

    def turn_fields(self, columns: ColumnsConfig) -> tuple[str, str]:
        """Returns the fields of a turn, as the rows call them."""
        renamed = ("role", "content") if "role" in self.turn_columns else ("", "")
        return tuple(getattr(columns, column, "") or name for column, name in zip(renamed, self.turns, strict=True))

    def has_fields(self, row: Mapping[str, Any], columns: ColumnsConfig) -> bool:
        """Returns whether a row has every required field."""
        names = self.names(columns)
        return all(_has(row, names[column]) for column in self.required)

    def misfit(self, row: Mapping[str, Any], columns: ColumnsConfig) -> str:
        """Returns why a row has not the shape of the format, or "" where it has. What fields hold is left to `read`."""
        names = self.names(columns)
        for column in self.required:
            if not _has(row, names[column]):
                return _missing(row, names[column], column)
        if self.turns[0]:
            turns = row[names["messages"]]
            first = turns[0] if isinstance(turns, list) and turns else None
            fields = self.turn_fields(columns)
            if isinstance(first, dict) and not all(key in first for key in fields):
                needed = " and ".join(map(repr, fields))
                hint = "data.columns.messages names the field of another format"
                return in_message(f"the turns in '{names['messages']}' have no {needed} ({hint})")
        return ""

    def read(self, row: Mapping[str, Any], columns: ColumnsConfig) -> Conversation:
        """Returns the conversation in a row. Raises RowError naming the field and the remedy."""
        names, known, _, written = self._reading(columns)
        for column in self.required:
            if not _has(row, names[column]):
                raise RowError(
                    f"{_missing(row, names[column], column)}; correct the row or name the field in data.columns."
                )
        for field, content in UNSUPPORTED.items():
            if field in row and field not in known and row[field] not in NOTHING:
                if content == "tools" and "tools" in names:
                    raise RowError(f"field '{field}' brings tools and is not read; set data.columns.tools={field}, or leave such rows out.")
                raise RowError(f"field '{field}' brings {content}, which are not supported; leave such rows out.")
        expressions = {name: evaluate(name, row) for name in written}
        turns = self._standard_turns(row, names, columns) if self.turns[0] else {}
        return _with_arguments(self.reader({**row, **expressions, **turns}, names), row, names)

    def _standard_turns(self, row: Mapping[str, Any], names: Mapping[str, str], columns: ColumnsConfig) -> dict[str, Any]:
        """Returns the list of turns with the standard fields and roles, where data.columns has others."""
        fields, turns = self.turn_fields(columns), row[names["messages"]]
        if (fields == self.turns and not columns.roles) or not isinstance(turns, list):
            return {}

        def standard(turn: Any) -> Any:
            if not isinstance(turn, dict):
                return turn
            renamed = {ours: turn[theirs] for ours, theirs in zip(self.turns, fields, strict=True) if theirs in turn}
            rest = {name: value for name, value in turn.items() if name not in fields and name not in self.turns}
            speaker = renamed.get(self.turns[0])
            if isinstance(speaker, str):
                renamed[self.turns[0]] = columns.roles.get(speaker, speaker)
            return {**rest, **renamed}

        return {names["messages"]: [standard(turn) for turn in turns]}

    def unread_fields(self, row: Mapping[str, Any], columns: ColumnsConfig) -> set[str]:
        """Returns the fields of a row, and of its messages, that hold something and that `read` does not look at.

        Those of messages are called like "messages[].name".
        """
        columns_read, _, looked_at, _ = self._reading(columns)
        standard = self._standard_turns(row, columns_read, columns) if self.turns[0] and "messages" in columns_read else {}
        hidden = set(self.turns) - set(self.turn_fields(columns))  # by fields of other names
        unread = {name for name, value in row.items() if value is not None and name not in looked_at}
        for column in ("messages", "prompt", "completion"):
            name = columns_read.get(column, "")
            turns = row.get(name)
            if isinstance(turns, list):
                fields = {field for turn in standard.get(name, turns) for field in unread_fields(turn)}
                fields |= {field for turn in turns if isinstance(turn, dict) for field in hidden & turn.keys()}
                unread.update(f"{name}[].{field}" for field in fields)
        return {in_message(name) for name in unread}


class _Reading(NamedTuple):
    """A format with names of columns."""

    names: dict[str, str]  # column -> name of the field in the rows, or expression
    fields: frozenset[str]  # that columns name or that expressions read
    looked_at: frozenset[str]  # all fields that are not overlooked
    expressions: tuple[str, ...]


_READINGS: dict[tuple, _Reading] = {}  # by reader and names of columns; as many as there are data sets
_names_in = operator.attrgetter(*(field.name for field in dataclasses.fields(ColumnsConfig) if field.type is str))


def _with_arguments(conversation: Conversation, row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    """Returns a conversation with the tools and the template arguments that the row brings."""
    tools = read_tools(row.get(names["tools"]), names["tools"]) if "tools" in names else None
    kwargs = row.get(names["chat_template_kwargs"]) if "chat_template_kwargs" in names else None
    if kwargs in NOTHING:
        kwargs = None
    elif not isinstance(kwargs, dict):
        raise RowError(f"'{names['chat_template_kwargs']}' is {kind_of(kwargs)}, not an object; correct the row.")
    else:
        kwargs = {name: value for name, value in kwargs.items() if value is not None} or None  # as Parquet fills columns
        try:
            check_template_arguments(names["chat_template_kwargs"], kwargs or {})
        except UserError as error:
            raise RowError(str(error)) from error
    return replace(conversation, tools=tools, template_kwargs=kwargs) if tools or kwargs else conversation


def _has(row: Mapping[str, Any], name: str) -> bool:
    """Returns whether a row has a field; whether it has those of an expression is told when that is evaluated."""
    return is_expression(name) or row.get(name) is not None


def _missing(row: Mapping[str, Any], name: str, column: str) -> str:
    state = f"field '{name}' is null" if name in row else f"field '{name}' is missing"
    near = did_you_mean(name, (str(key) for key in row)) if row else "the row is empty"
    return in_message(f"{state} (data.columns.{column}); {near.replace('Known:', 'the row has:')}")


def _read_messages(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    turns = _list(row, names["messages"])
    messages = [read_message(turn, f"{names['messages']}[{index}]") for index, turn in enumerate(turns)]
    return _chat(messages, row, names)


def _read_sharegpt(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    turns = _list(row, names["messages"])
    messages = [read_turn(turn, f"{names['messages']}[{index}]") for index, turn in enumerate(turns)]
    return _chat(messages, row, names)


def _read_prompt_completion(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    """Two texts, joined as they are where there is no template, or two lists of messages; no answer is in a prompt."""
    prompt, completion = row[names["prompt"]], row[names["completion"]]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [read_message(turn, f"{names['prompt']}[{index}]") for index, turn in enumerate(prompt)]
        after = [read_message(turn, f"{names['completion']}[{index}]") for index, turn in enumerate(completion)]
        if not any(message.role == "assistant" for message in after):
            raise RowError(f"'{names['completion']}' has no assistant turn; correct the row.")
        return _chat([replace(message, given=True) for message in before] + after, row, names)
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError(
            f"'{names['prompt']}' is {kind_of(prompt)} and '{names['completion']}' is {kind_of(completion)}; "
            "give both as text, or both as lists of messages."
        )
    return Conversation(
        prompt=text_of(prompt, names["prompt"]),
        completion=text_of(completion, names["completion"]),
        system=_system(row, names),
    )


def _read_alpaca(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    """An instruction, perhaps with input, which follows after an empty line, and an output.

    Without a template an empty line ends the prompt too. The Stanford prompt is the chat template "alpaca".
    """
    prompt = text_of(row[names["instruction"]], names["instruction"])
    given = row.get(names["input"])
    given = "" if given is None else text_of(given, names["input"])
    prompt = f"{prompt}\n\n{given}" if prompt and given else prompt or given
    output = text_of(row[names["output"]], names["output"])
    history = row.get("history")
    if history in (None, []):
        return Conversation(prompt=prompt, completion=output, system=_system(row, names), separator="\n\n")
    if not isinstance(history, list):
        raise RowError(f"'history' is {kind_of(history)}, not a list of [question, answer] pairs; correct the row.")
    messages = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{index}] is not a pair of question and answer; correct the row.")
        messages += [Message("user", text_of(pair[0], f"history[{index}][0]"))]
        messages += [Message("assistant", text_of(pair[1], f"history[{index}][1]"))]
    return _chat([*messages, Message("user", prompt), Message("assistant", output)], row, names)


def _read_text(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    text = text_of(row[names["text"]], names["text"])
    if not text.strip():
        raise RowError(f"'{names['text']}' is empty, so there is nothing to learn; remove the row.")
    return Conversation(text=text)


def _read_segments(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    """Texts that are joined as they are, each with `label` (true or false) or a weight; no template is put around them."""
    texts: list[str] = []
    pieces: list[Piece] = []
    start = 0
    for index, segment in enumerate(_list(row, names["segments"])):
        place = f"{names['segments']}[{index}]"
        if not isinstance(segment, dict) or segment.get("text") is None:
            raise RowError(f"'{place}' has no 'text'; correct the row.")
        weight, label = weight_of(segment, place), segment.get("label")
        if (weight is None) == (label is None) or not isinstance(label, (bool, type(None))):
            raise RowError(f"{place}: needs either 'label', true or false, or a 'weight'; correct the row.")
        texts.append(text_of(segment["text"], f"{place}.text"))
        end = start + len(texts[-1])
        pieces.append(Piece(start, end, float(label) if weight is None else weight))
        start = end
    if not "".join(texts).strip():
        raise RowError(f"'{names['segments']}' holds no text, so there is nothing to learn; remove the row.")
    return Conversation(text="".join(texts), pieces=tuple(pieces))


def _read_tokens(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    """Token ids with weights, or with `labels` in which -100 is not supervised; else all of them are. Nothing is added."""
    ids = _numbers(row, names["ids"], "iu")
    if len(ids) < 2:
        raise RowError(f"'{names['ids']}' holds {len(ids)} tokens, so there is nothing to predict; remove the row.")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise RowError(f"'{names['ids']}' holds {ids.min() if ids.min() < 0 else ids.max()}, which is no token id; correct the row.")
    mask, labels = row.get("attention_mask"), row.get("labels")
    if mask is not None and not (_numbers(row, "attention_mask", "biu", len(ids)) == 1).all():
        raise RowError("'attention_mask' is not 1 everywhere, so the row is padded; leave the padding out.")
    weights = np.ones(len(ids), np.float32)
    if row.get(names["weights"]) is not None:
        if labels is not None:
            raise RowError(f"has both '{names['weights']}' and 'labels'; keep one of them.")
        with np.errstate(over="ignore"):  # what is infinite then is refused below
            weights = _numbers(row, names["weights"], "biuf", len(ids)).astype(np.float32)
        off = ~((weights == 0) | (weights >= LEAST) & (weights <= MOST))
        if off.any():
            raise RowError(f"'{names['weights']}' must be 0, or from {LEAST:g} to {MOST:g}, not {weights[off][0]}; correct the row.")
    elif labels is not None:
        labels = _numbers(row, "labels", "iu", len(ids))
        off = (labels != ids) & (labels != IGNORED)
        if off.any():
            place = int(off.argmax())
            raise RowError(f"'labels' has {labels[place]} at token {place}, where the id is {ids[place]}; give the id itself or {IGNORED}.")
        weights = (labels != IGNORED).astype(np.float32)
    return Conversation(ids=ids.astype(np.int32), weights=weights)


def _numbers(row: Mapping[str, Any], name: str, kinds: str, length: int | None = None) -> np.ndarray:
    value = row[name]
    try:
        numbers = np.array(value) if isinstance(value, list) else None
    except (ValueError, OverflowError):  # lists of different lengths
        numbers = None
    if numbers is None or numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in kinds):
        raise RowError(f"'{name}' is not a list of {'numbers' if 'f' in kinds else 'whole numbers'}; correct the row.")
    if length is not None and len(numbers) != length:
        raise RowError(f"'{name}' has {len(numbers)} numbers for {length} tokens; correct the row.")
    return numbers


def _list(row: Mapping[str, Any], name: str) -> list:
    turns = row[name]
    if not isinstance(turns, list):
        raise RowError(f"'{name}' is {kind_of(turns)}, not a list of messages; correct the row.")
    if not turns:
        raise RowError(f"'{name}' is empty; correct or remove the row.")
    return turns


def _system(row: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """Returns the row's own system prompt; an empty one counts as none."""
    value = row.get(names["system"])
    return (None if value is None else text_of(value, names["system"])) or None


def _chat(messages: Sequence[Message], row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    system = _system(row, names)
    if system is not None:
        if messages[0].role in ("system", "developer"):
            raise RowError(
                f"field '{names['system']}' and the first message both give a system prompt; keep one of them."
            )
        messages = [Message("system", system), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise RowError(
            "the conversation has no assistant turn, so there is nothing to learn; correct or remove the row."
        )
    return Conversation(messages=tuple(messages))


CHAT = {"system": "system", "tools": "tools", "chat_template_kwargs": "chat_template_kwargs"}
FORMATS: dict[str, Format] = {
    "messages": Format({"messages": "messages"}, CHAT, _read_messages, ("role", "content"), ("role", "content", "roles")),
    "prompt_completion": Format({"prompt": "prompt", "completion": "completion"}, CHAT, _read_prompt_completion),
    "alpaca": Format({"instruction": "instruction", "output": "output"}, {"input": "input", **CHAT}, _read_alpaca, own=("history",)),
    "sharegpt": Format({"messages": "conversations"}, CHAT, _read_sharegpt, ("from", "value"), ("roles",)),
    "text": Format({"text": "text"}, {}, _read_text),
    "segments": Format({"segments": "segments"}, {}, _read_segments),
    "tokens": Format({"ids": "input_ids"}, {"weights": "weights"}, _read_tokens, own=("labels", "attention_mask")),
}
