"""Tokens as text to show: fragments of one weight each, control tokens apart, and what must not be shown as it is."""

import functools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sft_jax.data.tokens import Tokenizer

# What would move a cursor, colour a terminal, hide text or turn its direction: C0 and C1 controls but for tab and newline,
# invisible and bidirectional marks, tag characters, halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]+")
_PARTIAL = "\ufffd"


class Fragment(NamedTuple):
    """Consecutive tokens of one weight."""

    text: str
    weight: float
    control: bool  # they are added tokens of the tokenizer: markup, not text
    start: int  # tokens [start, stop)
    stop: int


def fragments(tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray, each_token: bool = False) -> list[Fragment]:
    """Returns the text of tokens in pieces of one weight; with `each_token` one for every token.

    Text is what the ids decode to. A character whose bytes lie in several fragments is in the last of them.
    """
    if not len(ids):
        return []
    names, numbers = _control_tokens(tokenizer)
    control = np.isin(ids, numbers)
    begins = (weights[1:] != weights[:-1]) | (control[1:] != control[:-1]) | each_token
    bounds = [0, *(np.flatnonzero(begins) + 1).tolist(), len(ids)]
    found, values = [], ids.tolist()
    # Tokens [context, shown) stand before what is decoded, since the text of a token may depend on them; not so the control
    # tokens at the very front: some tokenizers put a space before all text, which is none of the text's own.
    context = shown = 0
    leading = True
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if control[start]:
            text = "".join(names[token] for token in values[start:stop])
            context, shown = stop if leading else start, stop
        else:
            leading = False
            before = tokenizer.decode(values[context:shown]) if context < shown else ""
            whole = tokenizer.decode(values[context:stop])
            last = stop == len(ids) or control[stop]
            if whole.endswith(_PARTIAL) and not last:  # a part of a character: it is shown with the rest of it
                text = ""
            else:
                text = whole[len(os.path.commonprefix([before, whole])) :]
                context, shown = start, stop
        found.append(Fragment(text, float(weights[start]), bool(control[start]), start, stop))
    return found


def supervised_text(tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray) -> str:
    """Returns the text of the tokens with a weight above 0, one after the other, control tokens by their names."""
    return "".join(fragment.text for fragment in fragments(tokenizer, ids, weights) if fragment.weight > 0)


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


@functools.lru_cache(maxsize=2)
def _control_tokens(tokenizer: Tokenizer) -> tuple[dict[int, str], np.ndarray]:
    """Returns id -> text of the tokens that are markup, and the ids; runs of white space that a vocabulary lists are none."""
    names = {token: text for text, token in tokenizer.added_tokens.items() if text.strip(" \t\r\n\u2581")}
    for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id), ("pad_token", tokenizer.pad_id)):
        if token is not None:
            names.setdefault(token, tokenizer.special_tokens.get(name, name))
    return names, np.array(sorted(names), np.int64)
