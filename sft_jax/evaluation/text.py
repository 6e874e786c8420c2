"""From generated ids to text, whole or as it comes."""

from collections.abc import Sequence
from typing import Protocol

from sft_jax.errors import UserError

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


def cut_before(text: str, strings: Sequence[str]) -> str:
    """Returns the text before the first of `strings` in it, all of it where there is none.

    >>> cut_before("12 apples.\\n\\nQ: and pears?", ["Q:", "\\n\\n"])
    '12 apples.'
    """
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))]


class TextUntilStop:
    """Hands on a text that comes piece by piece up to the first of some stop strings, and nothing that may be one's beginning.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._waiting = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Takes the next piece, and returns what can be given."""
        text = self._waiting + piece
        given = cut_before(text, self._strings)
        self.stopped |= len(given) < len(text)
        if not self.stopped:
            given = text[: len(text) - self._begun(text)]
            self._waiting = text[len(given) :]
        return given

    def finish(self) -> str:
        """Returns what was held back, once no more text comes."""
        return "" if self.stopped else self._waiting

    def _begun(self, text: str) -> int:
        """Returns how many characters at the end are the beginning of a stop string."""
        most = min(len(text), max(map(len, self._strings), default=1) - 1)
        return next((size for size in range(most, 0, -1) if any(string.startswith(text[-size:]) for string in self._strings)), 0)


class StopStrings:
    """Texts that end an answer."""

    def __init__(self, tokenizer: Decodes, strings: Sequence[str], skip_special_tokens: bool = True):
        """Raises UserError for a text that is empty."""
        if isinstance(strings, str) or not all(strings):
            raise UserError(f"stop: must be a list of texts that are not empty, not {strings!r}.")
        self._tokenizer, self._strings, self._skip = tokenizer, tuple(strings), skip_special_tokens

    def watch(self, prompt_ids: Sequence[int]) -> "Watch":
        """Returns what looks for the texts in the answer to a prompt."""
        return Watch(TextStream(self._tokenizer, prompt_ids, self._skip), self._strings)


class Watch:
    """Looks for stop strings in an answer as it grows."""

    def __init__(self, stream: TextStream, strings: tuple[str, ...]):
        self._stream, self._strings = stream, strings
        self._seen = 0
        self._tail = ""
        self._most = max(map(len, strings))

    def push(self, ids: Sequence[int]) -> int | None:
        """Takes the answer so far, and returns with how many of its tokens a stop string is complete; None = not yet."""
        for count in range(self._seen, len(ids)):
            self._tail += self._stream.push(ids[count : count + 1])
            if any(string in self._tail for string in self._strings):
                return count + 1
            self._tail = self._tail[max(len(self._tail) - self._most + 1, 0) :]
        self._seen = len(ids)
        return None
