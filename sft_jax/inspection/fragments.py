"""Tokens as text to show: fragments of one weight each, control tokens apart."""

import functools
import os
from typing import NamedTuple

import numpy as np

from sft_jax.data.tokenizers.tokens import Tokenizer

_PARTIAL = "\ufffd"
_MOST_BYTES = 4  # of a character, so that as many more tokens complete it


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
            # What ends in a part of a character is shown with the rest of it; a character that only looks so stays.
            if whole.endswith(_PARTIAL) and not last and not tokenizer.decode(values[context : stop + _MOST_BYTES]).startswith(whole):
                text = ""
            else:
                text = whole[len(os.path.commonprefix([before, whole])) :]
                context, shown = start, stop
        found.append(Fragment(text, float(weights[start]), bool(control[start]), start, stop))
    return found


def supervised_text(tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray) -> str:
    """Returns the text of the tokens with a weight above 0, one after the other, control tokens by their names."""
    return "".join(fragment.text for fragment in fragments(tokenizer, ids, weights) if fragment.weight > 0)


@functools.lru_cache(maxsize=2)
def _control_tokens(tokenizer: Tokenizer) -> tuple[dict[int, str], np.ndarray]:
    """Returns id -> text of the tokens that are markup, and the ids; runs of white space that a vocabulary lists are none."""
    names = {token: text for text, token in tokenizer.added_tokens.items() if text.strip(" \t\r\n\u2581")}
    for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id), ("pad_token", tokenizer.pad_id)):
        if token is not None:
            names.setdefault(token, tokenizer.special_tokens.get(name, name))
    return names, np.array(sorted(names), np.int64)
