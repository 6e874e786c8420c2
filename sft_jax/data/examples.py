"""What a row becomes: examples of token ids with weights, or a reason why it cannot be used."""

from typing import NamedTuple

import numpy as np

_LONGEST_MESSAGE = 4000  # characters; rows are longer
_EXCERPT = 400  # characters


def in_message(text: str) -> str:
    """Returns a text that quotes a row as it can be printed: without halves of surrogate pairs, and not as long as a row.

    >>> in_message("field '\\ud800'")
    "field '\\\\ud800'"
    """
    if len(text) > _LONGEST_MESSAGE:
        half = _LONGEST_MESSAGE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text.encode(errors="backslashreplace").decode()


def excerpt(text: str) -> str:
    """Returns a text in quotes as it can stand in a message: both its ends."""
    if len(text) <= _EXCERPT:
        return repr(text)
    return f"{text[: _EXCERPT // 4]!r} ... {text[-_EXCERPT * 3 // 4 :]!r}"


class RowError(Exception):
    """One row cannot be used. The message says why and what to do; the caller adds file and line."""

    def __init__(self, message: str):
        super().__init__(in_message(message))


class Example(NamedTuple):
    """Token ids of one document, and how much each counts as a target. No shift has been done.

    The first token is never a target, so its weight is 0. `turn` is -1, or the assistant turn (0, 1, ... among the
    assistant messages of the row) that the example was made for. Message m begins at token `turn_starts[m]`: at its
    header where that can be told from the text, else at its content; what stands before `turn_starts[0]` (BOS, say)
    belongs to no message. `text` is what was tokenised: the render, without what `plain_prefix` and EOS add as tokens;
    "" where the data bring tokens.
    """

    ids: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n], 0 = not supervised
    turn: int
    turn_starts: np.ndarray  # int32 [m]
    turn_roles: tuple[str, ...]  # [m]
    text: str


class BuiltRow(NamedTuple):
    """The examples of one row.

    `kind` says how they came about: "once" (the row was tokenised once), "cut" (a token straddled the beginning or the
    end of an answer, so the text was cut there), "per_turn" (the history is rendered differently once it is history, so
    assistant turns are examples of their own), "plain" (no template). `counts` holds what a report should add up; see
    `sft_jax.data.chats.chat.COUNTS`.
    """

    examples: tuple[Example, ...]
    kind: str
    counts: dict[str, int]


class BadRow(NamedTuple):
    """A row that cannot be used, and why."""

    reason: str
