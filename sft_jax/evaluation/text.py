"""From generated ids to text, whole or as it comes."""

from collections.abc import Sequence
from typing import Protocol

_CONTEXT = 8  # prompt tokens that are decoded along; enough to know whether a word begins or goes on
_INCOMPLETE = "\ufffd"  # what a decoder gives for the bytes of a character that is not whole yet


class Decodes(Protocol):
    """The part of the tokenizer that is used here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...


class TextStream:
    """Turns the tokens that follow a prompt into text, piece by piece.

    The pieces joined are the text by which the prompt goes on: a SentencePiece decoder drops the space before the
    first token of a text, so tokens are decoded with some of the tokens before them. A piece is given only when its
    characters are whole (byte tokens make up one character between them).
    """

    def __init__(self, tokenizer: Decodes, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = self._context([int(i) for i in prompt_ids])
        self._begin = 0  # tokens from here on are decoded; always between two characters
        self._given = len(self._ids)  # text of the tokens before here was given

    def _context(self, prompt: list[int]) -> list[int]:
        # A decoder shows a whole run of byte tokens as broken when the first character of the run is cut.
        size = min(_CONTEXT, len(prompt))
        while size < len(prompt) and self._decode(prompt[-size:]).startswith(_INCOMPLETE):
            size += 1
        return prompt[len(prompt) - size :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens and returns the text that they complete, which may be empty."""
        self._ids.extend(int(i) for i in ids)
        text = self._new_text()
        if text.endswith(_INCOMPLETE):
            return ""
        if text:
            self._begin, self._given = self._given, len(self._ids)
        return text

    def finish(self) -> str:
        """Returns what is left: a character whose bytes never became whole, as the decoder shows it."""
        text = self._new_text()
        self._begin, self._given = self._given, len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._begin : self._given])
        return self._decode(self._ids[self._begin :])[len(before) :]


def continuation_text(
    tokenizer: Decodes, prompt_ids: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = True
) -> str:
    """Returns the text of `ids` as the continuation of the prompt: decode(prompt + ids) is decode(prompt) + this."""
    stream = TextStream(tokenizer, prompt_ids, skip_special_tokens)
    return stream.push(ids) + stream.finish()
