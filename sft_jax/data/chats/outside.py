"""Texts of a row that stand outside of contents: tools, template arguments, names and ids of calls.

A template puts them into text of its own, where nothing marks them, so what becomes of them cannot be guarded like contents.
None may hold the text of a control token; nor may a piece of one become a token together with what the template, or another
such text, has beside it (`'<' ~ name ~ '>'`).
"""

import json
import zlib
from dataclasses import replace
from typing import Any

from sft_jax.data.chats.guard import Guard
from sft_jax.data.chats.rendering import Rendering
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import Conversation
from sft_jax.data.formats.tool_calls import Call, field_names, texts_in

_REMEMBERED = 4096  # sets of such texts
# Words of the form that tools have, which templates read.
_SCHEMA = frozenset(
    "type function name description parameters properties required items enum default title format strict return returns "
    "string integer number boolean array object null any anyOf oneOf allOf additionalProperties $defs $ref".split()
)
_NEUTRAL = "\uf8ff"


def check_outside(conversation: Conversation, rendering: Rendering | None, guard: Guard) -> None:
    """Raises RowError where a text outside of contents becomes a control token, or may."""
    outside = _outside(conversation)
    if not any(outside):  # as in most rows
        return
    found = guard.find(texts_in(outside))
    if found:
        raise RowError(
            f"its tools, template arguments, or a name or id of a call hold the text of the control token {found!r}; remove it or "
            "set data.allow_special_tokens_in_content=True."
        )
    if rendering is None or conversation.kind == "text" or not any(map(guard.suspicious, texts_in(outside))):
        return
    key = json.dumps([outside, sorted({message.role for message in conversation.as_messages()})])
    if key not in rendering.checked_outside:
        shown, neutral = (_rendered(each, rendering) for each in (conversation, _neutral(conversation, guard)))
        if len(rendering.checked_outside) >= _REMEMBERED:
            rendering.checked_outside.clear()
        rendering.checked_outside[key] = None not in (shown, neutral) and not guard.joined(shown, neutral)
    if not rendering.checked_outside[key]:
        raise RowError(
            "its tools, template arguments, or a name or id of a call hold a piece of a control token, which may become one with "
            "what the template writes beside it; rename it or set data.allow_special_tokens_in_content=True."
        )


def _outside(conversation: Conversation) -> list[Any]:
    calls = [call for message in conversation.messages or () for call in message.calls]
    names = [name for message in conversation.messages or () for name in (message.name, message.call_id) if name]
    own = [part for call in calls for part in (call.name, call.id, list(field_names(call.arguments)))]
    return [conversation.tools, conversation.template_kwargs, own, names]


def _rendered(conversation: Conversation, rendering: Rendering) -> str | None:
    """Returns the render with contents of no meaning; None where the template refuses that."""
    try:
        variant = rendering.of(conversation.tools, conversation.template_kwargs)
        return variant.render_neutral(variant.dicts(conversation.as_messages()), False)
    except RowError:
        return None


def _neutral(conversation: Conversation, guard: Guard) -> Conversation:
    """Returns a conversation in which other texts stand for those that may be pieces of control tokens."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            doubtful = value not in _SCHEMA and guard.suspicious(value)
            return f"{_NEUTRAL}{zlib.crc32(value.encode()):x}" if doubtful else value
        if isinstance(value, dict):
            return {plain(name): plain(inner) for name, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    def renamed(call: Call) -> Call:
        names = {name: plain(name) for name in field_names(call.arguments)}
        arguments = _with_names(call.arguments, names)
        return Call(plain(call.name), arguments, plain(call.text), plain(call.id))

    messages = conversation.messages and tuple(
        replace(message, calls=tuple(map(renamed, message.calls)), name=plain(message.name), call_id=plain(message.call_id))
        for message in conversation.messages
    )
    tools = conversation.tools and tuple(map(plain, conversation.tools))
    kwargs = conversation.template_kwargs and {name: plain(value) for name, value in conversation.template_kwargs.items()}
    return replace(conversation, messages=messages, tools=tools, template_kwargs=kwargs)


def _with_names(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names[str(name)]: _with_names(inner, names) for name, inner in value.items()}
    return [_with_names(inner, names) for inner in value] if isinstance(value, list) else value
