"""How a template ends an assistant turn: the text that the model has to write so that a server stops.

A template says so only by what it renders. A conversation of four messages is rendered once and two places are
compared: what follows the last answer and what follows an answer that another message follows.
"""

import os
import re
from collections.abc import Collection
from typing import NamedTuple

from sft_jax.data.chats.locate import Locator, Render, only_tags, slots_of
from sft_jax.data.examples import RowError

_PROBE = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]
# What looks like a control token where the tokenizer does not say: <...> and [...] without white space inside.
MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


class TurnEnd(NamedTuple):
    """What a template writes around the end of turns."""

    end: str  # end of an assistant turn, supervised; such as "<|im_end|>"
    after: str  # what follows it at the end of a conversation, never supervised; such as "\n"
    added: bool  # the template writes no end at the end of a conversation: it has to be added
    user_end: str  # end of a user turn, where it can be told
    user_header: str  # beginning of a user turn, where it can be told


def find_turn_end(
    render: Render, locator: Locator, added_tokens: Collection[str], special_tokens: Collection[str], eos_token: str | None
) -> TurnEnd:
    """Returns how the template that `render` and `locator` belong to ends turns.

    Args:
        added_tokens: the texts that the tokenizer takes as a whole.
        special_tokens: those of them that a server may stop at: the special ones.
        eos_token: what ends a turn where the template itself has no end.
    """
    try:
        text = render(_PROBE, False)
        located = locator.locate(_PROBE, slots_of(_PROBE), False, text)
        ask, asked = render(_PROBE[:1], False), render(_PROBE[:1], True)
        located_ask = locator.locate(_PROBE[:1], slots_of(_PROBE[:1]), False, ask)
    except RowError:  # it does not take a plain chat; rows that it takes are judged by their own render
        return TurnEnd("", "", False, "", "")
    if located is None or located_ask is None or [region.message for region in located.regions] != [0, 1, 2, 3]:
        return TurnEnd("", "", False, "", "")
    first, answer, following, last = located.regions
    tail, middle = text[last.end :], text[answer.end : following.start]
    between, user_tail = text[first.end : answer.start], ask[located_ask.regions[0].end :]
    marker = re.compile("|".join([*map(re.escape, sorted(added_tokens, key=len, reverse=True)), MARKER.pattern]))
    opening = asked[len(ask) :] if asked.startswith(ask) else ""
    # Some templates begin an answer although nobody asked for it (others need nothing to begin one), and some of these
    # with an empty section of reasoning.
    shared = max((match.end() for match in marker.finditer(os.path.commonprefix([user_tail, between]))), default=0)
    always_opens = not opening and (between.startswith(user_tail) or only_tags(user_tail[shared:]))
    end = _end(tail, middle, opening, always_opens, marker)
    if always_opens and end == user_tail.rstrip():
        end = ""  # the beginning of an answer, and before it nothing
    after = tail[len(end) :]
    added = not end
    if added:
        end = _missing_end(tail, middle, marker, special_tokens, eos_token)
    header = middle[len(end) :].lstrip() if end and middle.startswith(end) and not added else ""
    return TurnEnd(end, after, added, "" if always_opens else _end(user_tail, between, opening, False, marker), header)


def _end(tail: str, middle: str, opening: str, always_opens: bool, marker: re.Pattern) -> str:
    """Returns the end of a turn, a prefix of `tail`; "" where there is none.

    Args:
        tail: what follows the turn at the end of a conversation.
        middle: what follows it where another message comes next, up to the content of that.
        opening: what add_generation_prompt adds.
        always_opens: whether the beginning of an answer is written although nobody asked for it.
    """
    core = tail.rstrip()
    common = os.path.commonprefix([tail, middle])
    if len(common.rstrip()) >= len(core):
        return core
    # The tail goes on after the end of the turn, with EOS or with the beginning of the next message, or the end differs
    # from that of earlier turns. A marker that begins messages is no part of the end.
    opener = marker.search(opening)
    ends = []
    for match in marker.finditer(common):
        if opener is not None and match.group() == opener.group() and match.start():
            break
        ends.append(match.end())
    if always_opens and len(ends) > 1:
        ends.pop()
    return tail[: ends[-1]] if ends else core


def _missing_end(
    tail: str, middle: str, marker: re.Pattern, special_tokens: Collection[str], eos_token: str | None
) -> str:
    """Returns the end of turns of a template that writes none: the head of the next message if that is one special token.

    GLM stops at `<|user|>`, a special token. `<用户>` of MiniCPM, a token that is not, is a piece of text that its model never
    writes, and stops at EOS.
    """
    head = middle[len(tail) :] if middle.startswith(tail) else middle
    match = marker.match(head)
    if match and match.group() in special_tokens:
        return match.group()
    return eos_token or ""
