"""Tokens at the end of a prompt: training must see the ids that inference feeds.

A tokenizer joins characters across the end of a prompt ("assistant\\n" + "\\nfoo" has one token for both line feeds),
and may even cut the prompt differently because of what follows. Offsets show the first; for the second the last words
of the prompt are encoded once more without what follows. That is enough, since tokenizers look no further: text between
added tokens, and words between spaces, are tokenised on their own.
"""

from collections.abc import Sequence

import numpy as np

from sft_jax.data.tokenizers.alignment import Encoding
from sft_jax.data.tokenizers.tokens import Tokenizer

_WORDS = 16  # characters at least that are encoded again
_FAR = 256  # and at most, before the whole prompt is
_REMEMBERED = 1 << 16
_LONG = 2048  # characters that two texts must begin alike with, so that those are not encoded twice
_LEADS = ("\n", "a", ".", "0", "é", "漢")  # put before text that continues another, where a tokenizer adds a space


class SeamEncoder:
    """Encodes texts, tells where a prompt's ids would be others, and encodes texts that are cut there."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._added = np.zeros(tokenizer.vocab_size, bool)
        self._added[list(tokenizer.added_tokens.values())] = True
        self._seen: dict[str, bytes] = {}
        joined, spaced, bare = (tokenizer.encode(text) for text in ("the cat", " cat", "cat"))
        # How a word in a text is encoded alone: with its space, without, or not at all alike.
        self._skip = 0 if joined[-len(spaced) :] == spaced else 1 if joined[-len(bare) :] == bare else None
        alone = tokenizer.encode("b")
        self._adds_space = tokenizer.encode("\nb")[-len(alone) :] != alone

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Returns the tokens of each text.

        A text that begins like the one before it, as those of the turns of a long chat do, is encoded from the last added
        token on that both have there: what is before it is tokenised on its own.
        """
        if not texts:
            return []
        shared = [0, *(_shared_length(before, text) for before, text in zip(texts, texts[1:], strict=False))]
        alone = [number for number, length in enumerate(shared) if length < _LONG]
        found = dict(zip(alone, self.tokenizer.encode_with_offsets([texts[number] for number in alone]), strict=True))
        for number, length in enumerate(shared):
            if number not in found:
                found[number] = self._go_on(found[number - 1], length, texts[number])
        return [found[number] for number in range(len(texts))]

    def _go_on(self, before: Encoding, length: int, text: str) -> Encoding:
        """Returns the tokens of a text of which `length` characters are the beginning of the one that `before` is of."""
        known = int(before.ends.searchsorted(length, side="right"))
        added = self._added[before.ids[:known]]
        token = known - 1 - int(added[::-1].argmax()) if added.any() else 0
        start = int(before.starts[token]) if token else 0
        (rest,) = self.tokenizer.encode_with_offsets([text[start:]])
        if not token:
            return rest
        if before.ends[token - 1] > start or rest.ids[0] != before.ids[token]:  # no place at which texts fall apart
            return self.tokenizer.encode_with_offsets([text])[0]
        return Encoding(*(np.concatenate([old[:token], new]) for old, new in zip(before, _moved(rest, start), strict=True)))

    def broken(
        self, texts: Sequence[str], encodings: Sequence[Encoding], places: Sequence[Sequence[int]]
    ) -> list[set[int]]:
        """Returns for each text those of its `places` before which its ids are not the ids of the text up to there."""
        result: list[set[int]] = [set() for _ in texts]
        unseen: dict[str, list[tuple[int, int, int, bytes]]] = {}
        doubtful: list[tuple[int, int, int, bytes]] = []
        for number, (text, encoding, own) in enumerate(zip(texts, encodings, places, strict=True)):
            for place, token in zip(own, encoding.starts.searchsorted(own).tolist(), strict=True):
                if token == 0:
                    continue
                if encoding.ends[token - 1] > place:
                    result[number].add(place)
                    continue
                window, first = self._window(text, encoding, place, token)
                case = number, place, token, encoding.ids[first:token].tobytes()
                seen = self._seen.get(window)
                if seen is None:
                    unseen.setdefault(window, []).append(case)
                elif seen != case[-1]:
                    doubtful.append(case)
        windows = list(unseen)
        if len(self._seen) + len(windows) > _REMEMBERED:
            self._seen.clear()
        for window, encoding in zip(windows, self.encode(windows), strict=True):
            ids = encoding.ids.tobytes()
            if len(window) <= _LONG:  # a whole prompt is long, and does not come again
                self._seen[window] = ids
            doubtful += [case for case in unseen[window] if case[-1] != ids]
        prompts = self.encode([texts[number][:place] for number, place, _, _ in doubtful])
        for (number, place, token, _), prompt in zip(doubtful, prompts, strict=True):
            if not np.array_equal(prompt.ids, encodings[number].ids[:token]):
                result[number].add(place)
        return result

    def encode_cut(self, texts: Sequence[str], cuts: Sequence[int]) -> list[Encoding]:
        """Returns the tokens of each text up to its cut, and then those of the rest."""
        befores = self.encode([text[:cut] for text, cut in zip(texts, cuts, strict=True)])
        afters = self._continue([text[cut:] for text, cut in zip(texts, cuts, strict=True)])
        return [
            Encoding(*(np.concatenate(parts) for parts in zip(before, _moved(after, cut), strict=True)))
            for before, after, cut in zip(befores, afters, cuts, strict=True)
        ]

    def _continue(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodes texts that continue others: without the space that some tokenizers put before a text."""
        if not self._adds_space:
            return self.encode(texts)
        result: dict[int, Encoding] = {}
        for lead in _LEADS:
            left = [number for number in range(len(texts)) if number not in result]
            for number, encoding in zip(left, self.encode([lead + texts[number] for number in left]), strict=True):
                first = int(np.searchsorted(encoding.starts, 1))
                if first and encoding.ends[first - 1] <= 1:
                    result[number] = _moved(Encoding(*(part[first:] for part in encoding)), -1)
        left = [number for number in range(len(texts)) if number not in result]
        result.update(zip(left, self.encode([texts[number] for number in left]), strict=True))
        return [result[number] for number in range(len(texts))]

    def _window(self, text: str, encoding: Encoding, place: int, token: int) -> tuple[str, int]:
        """Returns the end of `text[:place]` from where it is tokenised on its own, and the token that begins it."""
        begin = max(0, token - 24)
        added = self._added[encoding.ids[begin:token]]
        if added.any():
            first = begin + int(np.flatnonzero(added)[-1])
            return text[encoding.starts[first] : place], first
        if self._skip is not None:
            space = place - _WORDS
            while (space := text.rfind(" ", max(0, place - _FAR), max(0, space))) > 0:
                if text[space - 1].isalnum() and text[space + 1].isalnum():
                    first = int(encoding.starts.searchsorted(space))
                    if encoding.starts[first] == space and encoding.ends[first - 1] <= space:
                        return text[space + self._skip : place], first
        return text[:place], 0


def _moved(encoding: Encoding, places: int) -> Encoding:
    """Returns the tokens with their ranges moved by so many characters."""
    return Encoding(encoding.ids, encoding.starts + np.int32(places), encoding.ends + np.int32(places))


def _shared_length(one: str, other: str) -> int:
    """Returns with how many characters two texts begin alike; 0 where those are too few to look at closely."""
    if one[:_LONG] != other[:_LONG]:
        return 0
    known, most = 0, min(len(one), len(other))
    while known < most:  # halving, since comparing a character at a time is slow
        middle = (known + most + 1) // 2
        if one[known:middle] == other[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known
