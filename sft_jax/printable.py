"""What must not be shown as it is: the content of data reaches terminals, pages and logs only through here."""

import re
from collections.abc import Iterator

# What would move a cursor, colour a terminal, hide text or turn its direction: C0 and C1 controls but for tab and newline,
# invisible and bidirectional marks, tag characters, halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]+")


def split_unsafe(text: str) -> Iterator[tuple[str, bool]]:
    r"""Yields pieces of a text and whether they stand for characters that must not be shown as they are.

    >>> list(split_unsafe("a\x1b[1mb"))
    [('a', False), ('\\x1b', True), ('[1mb', False)]
    """
    done = 0
    for match in _UNSAFE.finditer(text):
        if match.start() > done:
            yield text[done : match.start()], False
        yield "".join(map(_escaped, match.group())), True
        done = match.end()
    if done < len(text):
        yield text[done:], False


def printable(text: str) -> str:
    """Returns a text with what must not be shown as it is in escaped form."""
    return "".join(piece for piece, _ in split_unsafe(text))


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
