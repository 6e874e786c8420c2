"""Turns of a chat as rows write them: OpenAI's role and content, ShareGPT's from and value."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import ROLES, Message, Piece
from sft_jax.data.formats.tool_calls import Call, read_call_text, read_calls
from sft_jax.data.sources.json_rows import kind_of
from sft_jax.errors import did_you_mean

SPEAKERS = {
    "system": "system", "developer": "developer",
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "loss_weight", "train")
_READ = frozenset(("role", "content", "from", "value", *CALLS, *REASONING, *WEIGHTS))
_READ_OF_TOOLS = frozenset(("name", "tool_call_id"))  # of the messages of tools
LEAST, MOST = 1e-6, 1e6  # weights between which float32 loses nothing that matters, summed or divided


def read_message(turn: Any, where: str) -> Message:
    """Reads `{"role", "content"}` with `weight` (or LLaMA-Factory's `loss_weight`) or `train`, and reasoning.

    The content is text or a list of parts of type "text", which are joined and may have weights of their own,
    "reasoning" and "tool_call"; where there are calls of tools it may be missing. `where` names the turn in messages.
    Raises RowError.
    """
    calls = read_calls(turn, where) if isinstance(turn, dict) else ()
    turn = _object(turn, where, ("role",) if calls else ("role", "content"))
    role = text_of(turn["role"], f"{where}.role")
    if role not in ROLES:
        known = did_you_mean(role, ROLES)
        if role.lower() in SPEAKERS:
            known = f"did you mean '{SPEAKERS[role.lower()]}'? {known.rpartition('? ')[2]}"
        raise RowError(f"{where}: unknown role {role!r}; {known}.")
    parts = _parts(turn.get("content") or "", f"{where}.content") if calls else _parts(turn["content"], f"{where}.content")
    if parts.calls and calls:
        raise RowError(f"{where}: gives its calls twice; keep one of them.")
    calls = calls or parts.calls
    _check_caller(role, calls, where)
    reasoning = _reasoning(turn, where, role, parts.reasoning)
    weight, answered = weight_of(turn, where), _answered(turn, where, role)
    return Message(role, parts.text, weight, reasoning, pieces=parts.pieces, calls=calls, **answered)


def read_turn(turn: Any, where: str) -> Message:
    """Reads `{"from", "value"}` of ShareGPT, with the same weights; a "function_call" is one of the assistant. Raises RowError."""
    turn = _object(turn, where, ("from", "value"))
    calls = read_calls(turn, where)
    speaker, value = text_of(turn["from"], f"{where}.from"), text_of(turn["value"], f"{where}.value")
    if speaker == "function_call":
        if calls:
            raise RowError(f"{where}: gives its calls twice; keep one of them.")
        calls = read_call_text(value, f"{where}.value")
        return Message("assistant", "", weight_of(turn, where), _reasoning(turn, where, "assistant", []), calls=calls)
    if speaker not in SPEAKERS:
        raise RowError(f"{where}: unknown role {speaker!r}; {did_you_mean(speaker, SPEAKERS)}.")
    role = SPEAKERS[speaker]
    _check_caller(role, calls, where)
    reasoning = _reasoning(turn, where, role, [])
    return Message(role, value, weight_of(turn, where), reasoning, calls=calls, **_answered(turn, where, role))


def unread_fields(turn: Any) -> set[str]:
    """Returns the fields of a turn, of either kind, that hold something and are not read."""
    if not isinstance(turn, dict):
        return set()
    role = turn.get("role") or turn.get("from")
    read = _READ | _READ_OF_TOOLS if isinstance(role, str) and SPEAKERS.get(role) == "tool" else _READ
    return {name for name, value in turn.items() if name not in read and value is not None}


def text_of(value: Any, where: str) -> str:
    """Returns `value` if it is text that can be encoded. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"'{where}' is {kind_of(value)}, not text; correct the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"'{where}' holds half of a surrogate pair at character {error.start + 1}; remove it."
        ) from error
    return value


def _object(turn: Any, where: str, needed: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(
            f"'{where}' is {kind_of(turn)}, not an object with {' and '.join(map(repr, needed))}; correct the row."
        )
    for key in needed:
        if turn.get(key) is None:
            state = "is null" if key in turn else "is missing"
            raise RowError(
                f"{where}: '{key}' {state}; the turn has: {', '.join(map(str, turn)) or 'nothing'}; correct the row."
            )
    return turn


class _Parts(NamedTuple):
    """What a content consists of."""

    text: str
    reasoning: list[str] = []
    calls: tuple[Call, ...] = ()
    pieces: tuple[Piece, ...] = ()


def _parts(content: Any, where: str) -> _Parts:
    if not isinstance(content, list):
        return _Parts(text_of(content, where))
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    calls: list[Call] = []
    pieces: list[Piece] = []
    length = 0  # of the texts so far
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise RowError(
                f"'{place}' is {kind_of(part)}, not a part such as {{'type': 'text', 'text': ...}}; correct the row."
            )
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in (*texts, "tool_call"):
            raise RowError(f"{place}: parts of type {kind!r} are not supported, only text; leave such rows out.")
        given = [name for name in ("text", "value") if part.get(name) is not None]
        if len(given) != 1:
            raise RowError(f"{place}: needs one 'text'; correct the row.")
        text = text_of(part[given[0]], f"{place}.{given[0]}")
        if kind == "tool_call":
            calls += read_call_text(text, f"{place}.{given[0]}")
        else:
            texts[kind].append(text)
        start, length = length, length + len(text) * (kind == "text")
        weight = weight_of(part, place)
        if weight is None:
            continue
        if kind != "text":
            raise RowError(f"{place}: only parts of type 'text' can have weights of their own; weight the message instead.")
        pieces.append(Piece(start, length, weight))
    return _Parts("".join(texts["text"]), texts["reasoning"], tuple(calls), tuple(pieces))


def _check_caller(role: str, calls: tuple[Call, ...], where: str) -> None:
    if calls and role != "assistant":
        raise RowError(f"{where}: a tool call in a turn of the {role}; only an assistant calls tools.")


def _answered(turn: Mapping[str, Any], where: str, role: str) -> dict[str, str]:
    """Returns which call and which tool a message of a tool is of, as fields of Message."""
    if role != "tool":
        return {}
    fields = (("call_id", "tool_call_id"), ("name", "name"))
    return {ours: text_of(turn[field], f"{where}.{field}") for ours, field in fields if turn.get(field) is not None}


def weight_of(turn: Mapping[str, Any], where: str) -> float | None:
    """Returns the weight that a message, or a part of one, gives itself; None where it gives none. Raises RowError."""
    given = [name for name in WEIGHTS if turn.get(name) is not None]
    if len(given) > 1:
        raise RowError(f"{where}: has both '{given[0]}' and '{given[1]}'; keep one of them.")
    if not given:
        return None
    value = turn[given[0]]
    if given[0] == "train":
        if not isinstance(value, bool):
            raise RowError(f"{where}: 'train' is {kind_of(value)}, not true or false; correct the row.")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{where}: '{given[0]}' is {kind_of(value)}, not a number; correct the row.")
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not 0 <= weight < math.inf:
        raise RowError(f"{where}: '{given[0]}' must be 0 or more and finite, not {weight}; correct the row.")
    if weight and not LEAST <= weight <= MOST:
        raise RowError(f"{where}: '{given[0]}' must be 0, or from {LEAST:g} to {MOST:g}, not {weight}; correct the row.")
    return weight


def _reasoning(turn: Mapping[str, Any], where: str, role: str, parts: list[str]) -> str | None:
    given = [name for name in REASONING if turn.get(name) not in (None, "")]
    if len(given) + bool(parts) > 1:
        raise RowError(f"{where}: gives its reasoning more than once; keep one of them.")
    reasoning = text_of(turn[given[0]], f"{where}.{given[0]}") if given else "".join(parts) or None
    if reasoning and role != "assistant":
        raise RowError(f"{where}: reasoning in a turn of the {role}; only an assistant's has a meaning.")
    return reasoning
