"""Arguments of a run as defaults of the chat template that it exports, so that a server which passes none asks as training did."""

import keyword
import re
from collections.abc import Mapping
from typing import Any

from sft_jax.data.chats.templates import ChatTemplate

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORDS = frozenset(["true", "false", "none", "self", "loop", "super", "caller", "varargs", "kwargs"])  # of jinja, beside Python's


def with_defaults(template: ChatTemplate, arguments: Mapping[str, Any]) -> str:
    """Returns the source of `template` with `arguments` for those that a render is not given.

    What a render is given wins, None too. Names that no template can read are left out.

    >>> with_defaults(ChatTemplate("{{ messages }}"), {"enable_thinking": False})
    '{% set enable_thinking = enable_thinking if enable_thinking is defined else false %}\\n{{ messages }}'
    """
    lines = [f"{{% set {name} = {name} if {name} is defined else {_literal(value)} %}}\n" for name, value in arguments.items() if _readable(name)]
    # The newline belongs to the tag (trim_blocks), and the template still begins at the beginning of a line (lstrip_blocks).
    head = "".join(lines)
    return template.source if template.source.startswith(head) else head + template.source


def _readable(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and not keyword.iskeyword(name) and name not in _WORDS


def _literal(value: Any) -> str:
    """Returns a JSON value as jinja reads it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(value: str) -> str:
    """Returns a text in ASCII: jinja reads the escapes of Python, and no brace or percent sign may look like the end of a tag."""
    plain = {character for character in map(chr, range(32, 127)) if character.isalnum() or character in " _-.,:;/?!+=()<>@"}
    return '"' + "".join(character if character in plain else f"\\U{ord(character):08x}" for character in value) + '"'
