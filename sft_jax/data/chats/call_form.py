"""What a template does with calls of tools, told from what it renders: the form that it takes them in, and their end."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from sft_jax.data.chats.locate import Render
from sft_jax.data.chats.turn_end import MARKER, TurnEnd
from sft_jax.data.examples import RowError
from sft_jax.data.formats.tool_calls import CALL_FORMS, Call, CallForm, call_dict

RenderWithTools = Callable[[Sequence[dict[str, Any]], list[dict[str, Any]] | None], str]

_VALUE = "probed value"  # nothing but the call has it
_CALL = Call("probe", {"key": _VALUE}, f'{{"key": "{_VALUE}"}}', "probe0001")  # Mistral's ids have nine characters
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "A key."}}, "required": ["key"]},
    },
}


class CallEnd(NamedTuple):
    """How a turn of calls ends where it does not end as other turns do."""

    after: str  # what follows it at the end of a conversation, never supervised
    added: str  # what the model has to write there although the template does not, so that it stops


def find_call_form(render: RenderWithTools) -> tuple[CallForm | None, str]:
    """Returns the first form in which a template shows the call of a tool; None and why where it shows none.

    Templates write arguments as JSON from an object, or take them for JSON text; what they make of the other is an
    error, Python's notation of an object, or JSON in JSON. Some show calls only in a turn whose content is null.
    """
    reason, hidden = "", "they are not in the text"
    for with_result in (True, False):  # some take no message of a tool
        for tools in ([_TOOL], None):
            for form in CALL_FORMS:
                try:
                    text = render(_probe(form, 1)[: None if with_result else 2], tools)
                except RowError as error:
                    reason = hidden if reason == hidden else str(error)
                    continue
                shown = _VALUE in text and f"'{_VALUE}'" not in text and f'\\"{_VALUE}' not in text
                if shown and not (form.content is None and re.search(r"\bNone\b", text)):
                    return form, ""
                reason = hidden
    return None, reason


def find_call_end(render: Render, form: CallForm, turn_end: TurnEnd, special_tokens: Collection[str]) -> CallEnd:
    """Returns how a turn of one call ends in a template that ends it otherwise than `turn_end` says.

    `special_tokens` are the texts that the tokenizer takes as a whole and that a server may stop at.
    """
    try:
        shown = render(_probe(form, 1)[:2], False)
    except RowError:
        return CallEnd("", "")
    markers = [*MARKER.finditer(shown)]
    if turn_end.added:  # left to the next message, which is the result
        return CallEnd(turn_end.after, _added_end(render, form, shown, special_tokens, turn_end.end))
    closing = [*MARKER.finditer(turn_end.end)]
    if closing and (place := shown.rfind(closing[-1].group())) > shown.rfind(_VALUE):
        return CallEnd(shown[place + len(closing[-1].group()) :], "")  # it goes on after the end
    after = shown[len(shown.rstrip()) :]
    last = markers[-1].group() if markers and markers[-1].end() == len(shown.rstrip()) else ""
    try:
        two = render(_probe(form, 2)[:2], False)
    except RowError:  # one call a turn
        return CallEnd(after, "")
    if not last or two.count(last) < 2 * shown.count(last):
        return CallEnd(after, "")
    # What ends a turn of one call is what ends each of two calls, so it ends no turn; two calls show what does.
    rest = two[two.rfind(last) + len(last) :].rstrip()
    return CallEnd(after, rest or turn_end.end)


def _added_end(render: Render, form: CallForm, shown: str, special_tokens: Collection[str], usual: str) -> str:
    """Returns what has to be added to `shown`, a conversation that ends with a call, so that a server stops.

    That is the head of the result where it is a special token; nothing where the result follows directly on a special token
    that ends the calls (Apertus); else the end of other turns.
    """
    shown = shown.rstrip()
    try:
        answered = render(_probe(form, 1)[:3], False)
    except RowError:
        return usual
    if not answered.startswith(shown):
        return usual
    head = answered[len(shown) :]
    ends = [match.end() for match in (re.match(rf"\s*{re.escape(token)}", head) for token in special_tokens) if match]
    if ends:
        return head[: max(ends)]
    return "" if shown.endswith(tuple(special_tokens)) else usual


def _probe(form: CallForm, count: int) -> list[dict[str, Any]]:
    """Returns a conversation with a turn of `count` calls."""
    calls = [call_dict(_CALL._replace(id=f"probe000{number}"), form) for number in range(count)]
    results = [{"role": "tool", "content": "Two.", "tool_call_id": call["id"], "name": _CALL.name} for call in calls]
    turn = {"role": "assistant", "content": form.content, "tool_calls": calls}
    return [{"role": "user", "content": "One?"}, turn, *results, {"role": "assistant", "content": "Three."}]
