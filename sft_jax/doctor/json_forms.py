"""Whether answers are JSON, and in which form: an object or array as it is or in a code block, or a plain value."""

import json
import re

from sft_jax.doctor.texts import Texts

FORMS = ("", "object", "fenced", "value", "none")  # "": there is no answer; from the best to the worst
_FENCED = re.compile(r"(`{3,}|~{3,})(?:json)?[ \t]*\n(.*)\n[ \t]*\1", re.DOTALL | re.IGNORECASE)


def json_forms(texts: Texts) -> tuple[str, str]:
    """Returns the form of the last answer, and the worst of those before it. Calls of tools are no answers here."""
    conversation = texts.conversation
    if conversation is not None and conversation.kind == "chat":
        answers = [
            message.content
            for message in conversation.messages
            if message.role == "assistant" and not message.given and not message.calls
        ]
    else:
        answers = list(texts.answers)
    forms = [json_form(answer) for answer in answers]
    return forms[-1] if forms else "", max(forms[:-1], key=FORMS.index, default="")


def json_form(answer: str) -> str:
    """Returns which of FORMS an answer is. NaN and Infinity are no JSON (RFC 8259).

    >>> [json_form(text) for text in (" ", '{"a": 1}', "```json\\n[1]\\n```", '"yes"', "yes", '{"a": NaN}')]
    ['', 'object', 'fenced', 'value', 'none', 'none']
    """
    answer = answer.strip()
    if not answer:
        return ""
    fenced = _FENCED.fullmatch(answer)
    try:
        value = json.loads(fenced[2] if fenced else answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return "none"
    if fenced:
        return "fenced"
    return "object" if isinstance(value, (dict, list)) else "value"


def _refuse(name: str):
    raise ValueError(name)
