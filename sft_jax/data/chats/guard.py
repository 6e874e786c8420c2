"""The injection guard: what a row's content says never becomes a control token.

A tokenizer finds the texts of its added tokens wherever they stand, and for a chat model `<|im_end|>` typed by a user
would end the user's turn. It is not enough to ask it to take special tokens for text: added tokens that are not
"special", such as `<think>` or `<tool_call>`, steer models as well. So a row whose content holds the text of an added
token is encoded by a clone of the tokenizer whose added tokens go by private aliases. Tokens that the template wrote
are replaced by their aliases, content is left alone, and one encode does the rest.
"""

import bisect
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sft_jax.data.chats.locate import REASONING_TAGS, Slot
from sft_jax.data.chats.seams import SeamEncoder
from sft_jax.data.chats.text_plans import TextPlan
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import Message, Piece
from sft_jax.data.formats.tool_calls import texts_in
from sft_jax.data.longest import longest_of
from sft_jax.data.tokenizers.alignment import Encoding
from sft_jax.data.tokenizers.tokens import Tokenizer

REASONING = frozenset(tag for pair in REASONING_TAGS for tag in pair)
_SIGNS = re.compile(r"[<>\[\]|\uff5c]")  # what control tokens are made of beside letters
_FIRST_ALIAS = 0x108000  # aliases are characters of the last private-use plane
_LAST_ALIAS = 0x10FFFD


@functools.lru_cache(maxsize=4)
def guard_of(tokenizer: Tokenizer) -> "Guard":
    """Returns the guard of a tokenizer; making the clone takes seconds, so there is one."""
    return Guard(tokenizer)


class Guard:
    """Knows a tokenizer's control tokens, and encodes around them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Runs of white space that a vocabulary lists as added tokens control nothing.
        texts = [text for text in tokenizer.added_tokens if text.strip(" \t\r\n\u2581")]
        if len(texts) > _LAST_ALIAS - _FIRST_ALIAS:
            raise ValueError(f"{len(texts)} added tokens are more than there are aliases for them")
        self._aliases = {text: chr(_FIRST_ALIAS + number) for number, text in enumerate(texts)}
        self._originals = {ord(alias): text for text, alias in self._aliases.items()}
        self._alias = re.compile(f"[{chr(_FIRST_ALIAS)}-{chr(_FIRST_ALIAS + len(texts))}]")
        self._any = _pattern(texts)
        self._other = _pattern([text for text in texts if text not in REASONING])
        self._thought = _pattern([text for text in texts if text in REASONING])
        self._inner = frozenset(text[1:-1] for text in texts if text[:1] + text[-1:] in ("<>", "[]"))
        self._control = np.zeros(tokenizer.vocab_size, bool)
        self._control[[tokenizer.added_tokens[text] for text in texts]] = True
        self._reasoning_ids = {tokenizer.added_tokens[text] for text in texts if text in REASONING}

    @functools.cached_property
    def encoder(self) -> SeamEncoder:
        """Encodes with the clone, which knows added tokens by their aliases only."""
        return SeamEncoder(self._tokenizer.aliased(self._aliases))

    def needed(self, messages: Sequence[Message]) -> bool:
        """Returns whether content holds the text of a control token; reasoning markup of the assistant may stay."""
        for message in messages:
            pattern = self._other if message.role == "assistant" else self._any
            if pattern.search(message.content) or (message.reasoning and pattern.search(message.reasoning)):
                return True
            if any(self._any.search(text) for call in message.calls for text in texts_in(call.arguments)):
                return True
        return False

    def find(self, texts: Iterable[str]) -> str | None:
        """Returns the first control token whose text one of `texts` holds."""
        found = next(filter(None, map(self._any.search, texts)), None)
        return found.group() if found else None

    def suspicious(self, text: str) -> bool:
        """Returns whether a text could become a control token with others beside it: it has signs that are part of some, or is

        what stands between the brackets of one.
        """
        return bool(_SIGNS.search(text)) or text in self._inner

    def joined(self, text: str, neutral: str) -> bool:
        """Returns whether a text has control tokens, of any kind, that another one has not."""
        return bool(np.any(self._more(np.array(self._tokenizer.encode(text), np.int64), neutral)))

    def doubtful(self, messages: Sequence[dict[str, Any]], slots: Sequence[Slot]) -> bool:
        """Returns whether a content holds the text of a control token, so that no piece of it may pass for the template's."""
        return any(
            (self._other if messages[slot.message]["role"] == "assistant" and slot.kind != "call" else self._any).search(slot.text)
            for slot in slots
        )

    def rewrite(self, plan: TextPlan) -> TextPlan:
        """Returns a plan for the clone: control tokens outside of content by their aliases, all places moved along.

        Raises RowError where it is not known which part of the text is content, or where the text uses the aliases.
        """
        if not plan.complete:
            raise RowError(
                "its content holds the text of a control token, and the template does not show where content is; "
                "remove that text or set data.allow_special_tokens_in_content=True."
            )
        if self._alias.search(plan.text):
            raise RowError(
                "its content holds the text of a control token and private-use characters; remove one of them."
            )
        parts, old, new, done = [], [0], [0], 0

        def take(stop: int, pattern: re.Pattern) -> None:
            nonlocal done
            for match in pattern.finditer(plan.text, done, stop):
                parts.extend((plan.text[done : match.start()], self._aliases[match.group()]))
                old.append(match.end())
                new.append(new[-1] + match.start() - done + 1)
                done = match.end()
            parts.append(plan.text[done:stop])
            old.append(stop)
            new.append(new[-1] + stop - done)
            done = stop

        for region in plan.regions:
            take(region.start, self._any)
            thinks = plan.roles[region.message] == "assistant" and region.kind != "call"
            take(region.end, self._thought if thinks else _NOTHING)
        take(len(plan.text), self._any)

        def move(place: int) -> int:
            number = bisect.bisect_right(old, place) - 1
            return new[number] + place - old[number]

        return TextPlan(
            "".join(parts),
            [
                span._replace(
                    start=move(span.start), end=move(span.end),
                    pieces=tuple(Piece(move(piece.start), move(piece.end), piece.weight) for piece in span.pieces),
                )
                for span in plan.spans
            ],
            plan.turn,
            [move(start) for start in plan.starts],
            plan.roles,
            tuple(region._replace(start=move(region.start), end=move(region.end)) for region in plan.regions),
            plan.complete,
            plan.ends_with_eos,
        )

    def restore(self, text: str) -> str:
        """Returns a text that `rewrite` made as it was before: no alias was in it then."""
        return text.translate(self._originals)

    def leaks(self, plans: Sequence[TextPlan], encodings: Sequence[Encoding]) -> list[int]:
        """Returns the numbers of the plans in which content became a control token after all.

        That happens where the text of a token only comes about by normalisation, or with what stands around content.
        """
        if not plans:
            return []
        flagged = np.flatnonzero(self._control[np.concatenate([encoding.ids for encoding in encodings])])
        ends = np.cumsum([len(encoding.ids) for encoding in encodings])
        sizes = np.fromiter((len(plan.text) + 1 for plan in plans), np.int64, len(plans))
        bases = np.cumsum(sizes) - sizes
        numbers = np.searchsorted(ends, flagged, side="right")
        starts = np.concatenate([encoding.starts for encoding in encodings])[flagged] + bases[numbers]
        stops = np.concatenate([encoding.ends for encoding in encodings])[flagged] + bases[numbers]
        result = {
            number
            for number in np.unique(numbers).tolist()
            if plans[number].neutral is not None and self._joined(encodings[number].ids, plans[number].neutral)
        }
        based = zip(plans, bases.tolist(), strict=True)
        places = [(base + region.start, base + region.end) for plan, base in based for region in plan.regions]
        if not places:
            return sorted(result)
        regions = np.array(places)
        nearest = np.searchsorted(regions[:, 0], stops) - 1  # the last region that begins before the token ends
        hit = (nearest >= 0) & (regions[nearest, 1] > starts)
        for token, number, start, stop in zip(flagged[hit], numbers[hit], starts[hit], stops[hit], strict=True):
            plan, encoding = plans[number], encodings[number]
            id_ = int(encoding.ids[token - (ends[number] - len(encoding.ids))])
            place = int(start - bases[number])
            if not self._allowed(plan, id_, place, int(stop - bases[number])):
                result.add(int(number))
        return sorted(result)

    def _joined(self, ids: np.ndarray, neutral: str) -> bool:
        """Returns whether a text has control tokens that it has not with other contents in it.

        It decides where it is not known which part of the text is content: no content holds the text of a token, but
        a piece of one may have become a token together with what stands beside it. Reasoning markup may be content.
        """
        more = self._more(ids, neutral)
        more[list(self._reasoning_ids)] = False
        return bool(more.any())

    def _more(self, ids: np.ndarray, neutral: str) -> np.ndarray:
        """Returns of which tokens `ids` has more than a text, bool [vocabulary]; only control tokens count."""
        others = np.array(self._tokenizer.encode(neutral), np.int64)
        counts, usual = (np.bincount(part[self._control[part]], minlength=len(self._control)) for part in (ids, others))
        return counts > usual

    def _allowed(self, plan: TextPlan, token: int, start: int, stop: int) -> bool:
        """Returns whether a control token that touches content is reasoning markup of the assistant, or an alias."""
        if self._alias.search(plan.text, start, stop):
            return True
        if token not in self._reasoning_ids:
            return False
        touched = [region for region in plan.regions if region.start < stop and region.end > start]
        return any(plan.roles[region.message] == "assistant" and region.kind != "call" for region in touched)


def _pattern(texts: Sequence[str]) -> re.Pattern:
    """Returns a pattern that finds the longest of `texts`, however many begin alike with what a row repeats."""
    return re.compile(longest_of(texts)) if texts else _NOTHING


_NOTHING = re.compile(r"(?!)")
