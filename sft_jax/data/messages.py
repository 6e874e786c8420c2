"""Turns of a chat as rows write them: OpenAI's role and content, ShareGPT's from and value."""

import math
from collections.abc import Mapping
from typing import Any

from sft_jax.data.conversation import ROLES, Message
from sft_jax.data.examples import RowError
from sft_jax.data.json_rows import kind_of
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
NOTHING = (None, "", "[]", "{}", [], {})  # how rows write that there are no tools, calls, images
WEIGHTS = ("weight", "loss_weight", "train")
_READ = frozenset(("role", "content", "from", "value", *CALLS, *REASONING, *WEIGHTS))
LEAST, MOST = 1e-6, 1e6  # weights between which float32 loses nothing that matters, summed or divided


def read_message(turn: Any, where: str) -> Message:
    """Reads `{"role", "content"}` with `weight` (or LLaMA-Factory's `loss_weight`) or `train`, and reasoning.

    The content is text or a list of parts of type "text", which are joined, and "reasoning". `where` names the turn in
    messages. Raises RowError.
    """
    turn = _object(turn, where, ("role", "content"))
    role = text_of(turn["role"], f"{where}.role")
    if role not in ROLES:
        known = did_you_mean(role, ROLES)
        if role.lower() in SPEAKERS:
            known = f"did you mean '{SPEAKERS[role.lower()]}'? {known.rpartition('? ')[2]}"
        raise RowError(f"{where}: unknown role {role!r}; {known}.")
    content, reasoning = _parts(turn["content"], f"{where}.content")
    return Message(role, content, _weight(turn, where), _reasoning(turn, where, role, reasoning))


def read_turn(turn: Any, where: str) -> Message:
    """Reads `{"from", "value"}` of ShareGPT, with the same weights. Raises RowError."""
    turn = _object(turn, where, ("from", "value"))
    speaker = text_of(turn["from"], f"{where}.from")
    if speaker == "function_call":
        raise RowError(f"{where}: is a tool call, which is not supported; leave such rows out.")
    if speaker not in SPEAKERS:
        raise RowError(f"{where}: unknown role {speaker!r}; {did_you_mean(speaker, SPEAKERS)}.")
    role = SPEAKERS[speaker]
    return Message(
        role, text_of(turn["value"], f"{where}.value"), _weight(turn, where), _reasoning(turn, where, role, [])
    )


def unread_fields(turn: Any) -> set[str]:
    """Returns the fields of a turn, of either kind, that hold something and are not read."""
    if not isinstance(turn, dict):
        return set()
    return {name for name, value in turn.items() if name not in _READ and value is not None}


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
    for call in CALLS:
        if turn.get(call) not in NOTHING:
            raise RowError(f"{where}: '{call}' is a tool call, which is not supported; leave such rows out.")
    for key in needed:
        if turn.get(key) is None:
            state = "is null" if key in turn else "is missing"
            raise RowError(
                f"{where}: '{key}' {state}; the turn has: {', '.join(map(str, turn)) or 'nothing'}; correct the row."
            )
    return turn


def _parts(content: Any, where: str) -> tuple[str, list[str]]:
    """Returns the text and the reasoning of a content."""
    if not isinstance(content, list):
        return text_of(content, where), []
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise RowError(
                f"'{place}' is {kind_of(part)}, not a part such as {{'type': 'text', 'text': ...}}; correct the row."
            )
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in texts:
            raise RowError(f"{place}: parts of type {kind!r} are not supported, only text; leave such rows out.")
        given = [name for name in ("text", "value") if part.get(name) is not None]
        if len(given) != 1:
            raise RowError(f"{place}: needs one 'text'; correct the row.")
        texts[kind].append(text_of(part[given[0]], f"{place}.{given[0]}"))
    return "".join(texts["text"]), texts["reasoning"]


def _weight(turn: Mapping[str, Any], where: str) -> float | None:
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
