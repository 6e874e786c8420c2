"""FORMATS: what the fields of a row mean. A format reads a row into a Conversation, or says why it cannot.

Formats are tables of functions: a new one is a reader and an entry in FORMATS. `data.columns` gives fields other names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sft_jax.config import ColumnsConfig
from sft_jax.data.conversation import Conversation, Message
from sft_jax.data.examples import RowError
from sft_jax.data.json_rows import kind_of
from sft_jax.data.messages import NOTHING, read_message, read_turn, text_of, unread_fields
from sft_jax.errors import did_you_mean

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
    own: tuple[str, ...] = ()  # further fields that the reader reads, which cannot be renamed

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

    def unread_fields(self, row: Mapping[str, Any], columns: ColumnsConfig) -> set[str]:
        """Returns the fields of a row, and of its messages, that hold something and that `read` does not look at.

        Those of messages are called like "messages[].name".
        """
        names = self.names(columns).values()
        unread = {
            name
            for name, value in row.items()
            if value is not None and name not in names and name not in self.own and name not in UNSUPPORTED
        }
        for name in names:
            turns = row.get(name)
            if isinstance(turns, list):
                unread.update(f"{name}[].{field}" for turn in turns for field in unread_fields(turn))
        return unread


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
    "alpaca": Format({"instruction": "instruction", "output": "output"}, {"input": "input", **SYSTEM}, _read_alpaca, own=("history",)),
    "sharegpt": Format({"messages": "conversations"}, SYSTEM, _read_sharegpt, ("from", "value")),
    "text": Format({"text": "text"}, {}, _read_text),
}
