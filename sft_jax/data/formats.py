"""FORMATS: what the fields of a row mean. A format reads a row into a Conversation, or says why it cannot.

Formats are tables of functions: a new one is a reader and an entry in FORMATS. `data.columns` gives fields other names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from sft_jax.config import ColumnsConfig
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.examples import RowError
from sft_jax.data.messages import NOTHING, read_message, read_turn, text_of
from sft_jax.data.sources import Rows, kind_of
from sft_jax.errors import UserError, did_you_mean

SCANNED = 10_000  # rows of a larger data set that detection looks at; reading checks every row

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
    turns: tuple[str, str] = ("", "")  # fields that every turn of a chat has

    def names(self, columns: ColumnsConfig) -> dict[str, str]:
        """Returns column -> name of the field in the rows."""
        return {column: getattr(columns, column) or name for column, name in {**self.required, **self.optional}.items()}

    def has_fields(self, row: Mapping[str, Any], columns: ColumnsConfig) -> bool:
        """Returns whether a row has every required field."""
        names = self.names(columns)
        return all(row.get(names[column]) is not None for column in self.required)

    def misfit(self, row: Mapping[str, Any], columns: ColumnsConfig) -> str:
        """Returns why a row has not the shape of the format, or "" where it has. What fields hold is left to `read`."""
        names = self.names(columns)
        for column in self.required:
            if row.get(names[column]) is None:
                return _missing(row, names[column], column)
        if self.turns[0]:
            turns = row[names["messages"]]
            first = turns[0] if isinstance(turns, list) and turns else None
            if isinstance(first, dict) and not all(key in first for key in self.turns):
                needed = " and ".join(map(repr, self.turns))
                hint = "data.columns.messages names the field of another format"
                return f"the turns in '{names['messages']}' have no {needed} ({hint})"
        return ""

    def read(self, row: Mapping[str, Any], columns: ColumnsConfig) -> Conversation:
        """Returns the conversation in a row. Raises RowError naming the field and the remedy."""
        names = self.names(columns)
        for column in self.required:
            if row.get(names[column]) is None:
                raise RowError(
                    f"{_missing(row, names[column], column)}; correct the row or name the field in data.columns."
                )
        for field, content in UNSUPPORTED.items():
            if row.get(field) not in NOTHING and field not in names.values():
                raise RowError(f"field '{field}' brings {content}, which are not supported; leave such rows out.")
        return self.reader(row, names)


def _missing(row: Mapping[str, Any], name: str, column: str) -> str:
    state = f"field '{name}' is null" if name in row else f"field '{name}' is missing"
    near = did_you_mean(name, (str(key) for key in row)) if row else "the row is empty"
    return f"{state} (data.columns.{column}); {near.replace('Known:', 'the row has:')}"


def _read_messages(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    turns = _list(row, names["messages"])
    messages = [read_message(turn, f"{names['messages']}[{index}]") for index, turn in enumerate(turns)]
    return _chat(messages, row, names)


def _read_sharegpt(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    turns = _list(row, names["messages"])
    messages = [read_turn(turn, f"{names['messages']}[{index}]") for index, turn in enumerate(turns)]
    return _chat(messages, row, names)


def _read_prompt_completion(row: Mapping[str, Any], names: Mapping[str, str]) -> Conversation:
    """Two texts, joined as they are where there is no template, or two lists of messages, the prompt's unsupervised."""
    prompt, completion = row[names["prompt"]], row[names["completion"]]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [read_message(turn, f"{names['prompt']}[{index}]") for index, turn in enumerate(prompt)]
        after = [read_message(turn, f"{names['completion']}[{index}]") for index, turn in enumerate(completion)]
        if not any(message.role == "assistant" for message in after):
            raise RowError(f"'{names['completion']}' has no assistant turn; correct the row.")
        before = [
            Message(message.role, message.content, 0.0 if message.weight is None else message.weight, message.reasoning)
            for message in before
        ]
        return _chat(before + after, row, names)
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
    return Conversation(text=text_of(row[names["text"]], names["text"]))


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


SYSTEM = {"system": "system"}
FORMATS: dict[str, Format] = {
    "messages": Format({"messages": "messages"}, SYSTEM, _read_messages, ("role", "content")),
    "prompt_completion": Format({"prompt": "prompt", "completion": "completion"}, SYSTEM, _read_prompt_completion),
    "alpaca": Format({"instruction": "instruction", "output": "output"}, {"input": "input", **SYSTEM}, _read_alpaca),
    "sharegpt": Format({"messages": "conversations"}, SYSTEM, _read_sharegpt, ("from", "value")),
    "text": Format({"text": "text"}, {}, _read_text),
}


def resolve_format(name: str, rows: Rows, columns: ColumnsConfig, skip_bad_rows: bool = False) -> str:
    """Returns the format that `data.format` names, or with "auto" the one that the rows have.

    Raises UserError for an unknown name, a column that the format has not, a named optional column that no row has, and
    as `detect_format` does.
    """
    if name == "auto":
        return detect_format(rows, columns, skip_bad_rows)
    if name not in FORMATS:
        raise UserError(f"data.format: '{name}' is not a format; {did_you_mean(name, ['auto', *FORMATS])}.")
    known = FORMATS[name].names(columns)
    for column in _named(columns):
        if column not in known:
            raise UserError(
                f"data.columns.{column}: the format '{name}' has no such field; {did_you_mean(column, known)}."
            )
    if any(getattr(columns, column) for column in FORMATS[name].optional):
        _check_optional(FORMATS[name], columns, {field for _, row in _scan(rows, strict=False) for field in row})
    return name


def detect_format(rows: Rows, columns: ColumnsConfig, skip_bad_rows: bool = False) -> str:
    """Returns the name of the format that all rows have; of a data set above SCANNED rows, all of an even sample.

    Every row is checked again when it is read. Raises UserError naming the first row that does not fit, or two formats
    that both do. With `skip_bad_rows` the format that most rows have is enough.
    """
    named = _named(columns)
    candidates = {
        name: form for name, form in FORMATS.items() if all(column in form.names(columns) for column in named)
    }
    if not candidates:
        raise UserError(f"data.columns: no format has all of {', '.join(named)}; {_known_columns()}.")
    count, known, first = 0, set(), None  # rows, all their fields, (number, row) of the first
    misfits: dict[str, int] = dict.fromkeys(candidates, 0)
    first_misfit: dict[str, tuple[int, str]] = {}
    for index, row in _scan(rows, strict=not skip_bad_rows):
        first = (index, row) if first is None else first
        count += 1
        known.update(row)
        for name, form in candidates.items():
            if reason := form.misfit(row, columns):
                misfits[name] += 1
                first_misfit.setdefault(name, (index, reason))
    if first is None:
        raise UserError(f"{rows.where(0)}: neither this row nor any other can be read; correct the file.")
    fewest = min(misfits.values())
    if fewest == count:
        index, row = first
        near = [
            form.misfit(row, columns) for form in candidates.values() if form.turns[0] and form.has_fields(row, columns)
        ]
        raise UserError(
            f"{rows.where(index)}: fits no format; the row has: {', '.join(row) or 'no field'}. "
            f"{''.join(f'{reason}. ' for reason in near)}Name its fields, such as "
            f"data.columns.prompt=question data.columns.completion=answer; {_known_columns()}."
        )
    best = [name for name in candidates if misfits[name] == fewest]
    if len(best) > 1:
        raise UserError(
            f"{rows.where(first[0])}: the rows fit the formats {' and '.join(best)}; name one, such as "
            f"data.format={best[0]}."
        )
    if fewest and not skip_bad_rows:
        index, reason = first_misfit[best[0]]
        raise UserError(
            f"{rows.where(index)}: is not in the format '{best[0]}', which {count - fewest} of {count} rows have: "
            f"{reason}. Correct the row, put rows of different formats into different data sets, or set "
            "data.bad_rows=skip."
        )
    _check_optional(FORMATS[best[0]], columns, known)
    return best[0]


def _scan(rows: Rows, strict: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) of all rows or an even sample. Rows that cannot be read raise UserError, or are left out."""
    count = len(rows)
    numbers = (
        range(count) if count <= SCANNED else np.unique(np.linspace(0, count - 1, SCANNED).astype(np.int64)).tolist()
    )
    for number in numbers:
        try:
            row = rows[number]
        except RowError as error:
            if strict:
                raise UserError(f"{rows.where(number)}: {error}") from error
            continue
        yield number, row


def _check_optional(form: Format, columns: ColumnsConfig, known: set[str]) -> None:
    """Raises UserError where an optional column was named and no row has it: the name must be wrong."""
    for column in form.optional:
        name = getattr(columns, column)
        if name and name not in known:
            raise UserError(f"data.columns.{column}: no row has a field '{name}'; {did_you_mean(name, known)}.")


def _named(columns: ColumnsConfig) -> list[str]:
    return [field.name for field in fields(columns) if getattr(columns, field.name)]


def _known_columns() -> str:
    parts = (f"{name} ({', '.join(form.names(ColumnsConfig()))})" for name, form in FORMATS.items())
    return f"formats and their data.columns: {', '.join(parts)}"
