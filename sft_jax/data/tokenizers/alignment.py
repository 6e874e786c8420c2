"""Where each token lies in its text, computed from the bytes that tokens stand for.

A tokenizer library that reports offsets pays for them in every text. Nearly all tokenizers keep the text's bytes, so
ranges follow from the lengths of the tokens alone; `align` computes them for a whole batch with a few numpy operations
and checks the result byte for byte. Where the bytes differ (a normaliser changed the text) the caller asks the library.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Encoding(NamedTuple):
    """Tokens of one text. Token i stands for text[starts[i]:ends[i]].

    Ranges do not decrease. Tokens that share a character (the bytes of an emoji) all carry the whole character. A space
    that the tokenizer put before the text shares the range of the first character.
    """

    ids: np.ndarray  # int32 [n]
    starts: np.ndarray  # int32 [n], characters
    ends: np.ndarray  # int32 [n], characters


class TokenBytes:
    """The bytes that each token id stands for, as flat arrays."""

    def __init__(self, pieces: Iterable[bytes]):
        """`pieces[i]` belongs to id i; b"" where an id stands for no fixed bytes."""
        pieces = list(pieces)
        self.lengths = np.fromiter((len(piece) for piece in pieces), np.int64, len(pieces))
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.data = np.frombuffer(b"".join(pieces), np.uint8)

    def concatenate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bytes of all `ids` in a row (uint8) and the end of each id in them (int64)."""
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        index = np.repeat(self.offsets[ids] - (ends - lengths), lengths) + np.arange(total)
        return self.data[index], ends


def align(table: TokenBytes, texts: Sequence[bytes], ids: Sequence[Sequence[int]]) -> list[Encoding | None]:
    """Returns the character ranges of tokens in UTF-8 `texts`; None where their bytes are not the text's.

    >>> table = TokenBytes([b" a", b"\\xc3", b"\\xa9"])
    >>> align(table, ["aé".encode()], [[0, 1, 2]])[0].ends.tolist()
    [1, 2, 2]
    """
    counts = np.fromiter((len(part) for part in ids), np.int64, len(ids))
    flat_ids = np.concatenate([np.asarray(part, np.int32) for part in ids]) if len(ids) else np.zeros(0, np.int32)
    made, ends = table.concatenate(flat_ids)
    last = np.cumsum(counts)
    first = last - counts
    boundary = np.concatenate([[0], ends])
    text_first, text_last = boundary[first], boundary[last]  # of each text in `made`
    sizes = np.fromiter((len(text) for text in texts), np.int64, len(texts))
    extra = text_last - text_first - sizes  # bytes more than the text has: 1 where a space was put before it
    fits = (extra == 0) | (extra == 1)
    wanted = np.frombuffer(
        b"".join(
            (b" " + text if more else text) if fit else bytes(int(size + more))
            for text, size, more, fit in zip(texts, sizes, extra, fits, strict=True)
        ),
        np.uint8,
    )
    wrong = np.concatenate([[0], np.cumsum(made != wanted)])
    empty = np.concatenate([[0], np.cumsum(table.lengths[flat_ids] == 0)])
    fits &= (wrong[text_last] == wrong[text_first]) & (empty[last] == empty[first])

    # A byte belongs to the character that the last leading byte before it began; a space put before the text to none.
    leading = (wanted & 0xC0) != 0x80
    leading[text_first[fits & (extra == 1)]] = False
    character = np.cumsum(leading)
    base = np.repeat(np.concatenate([[0], character])[text_first], counts)
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    inside = np.minimum(starts, max(len(wanted) - 1, 0))
    token_starts = (
        np.maximum(character[inside] - base - 1, 0).astype(np.int32) if len(wanted) else starts.astype(np.int32)
    )
    token_ends = np.maximum(character[ends - 1] - base, 1).astype(np.int32) if len(wanted) else starts.astype(np.int32)
    return [
        Encoding(flat_ids[a:b], token_starts[a:b], token_ends[a:b]) if fit else None
        for a, b, fit in zip(first, last, fits, strict=True)
    ]


def without_gaps(starts: np.ndarray, ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ranges that do not decrease and cover a text of `length` characters.

    A library leaves out what a normaliser merged or removed (the mark of a composed letter, extra spaces). Here it
    belongs to the token before it; at the beginning of the text, to the first one.

    >>> starts, ends = without_gaps(np.array([0, 3]), np.array([1, 4]), 5)
    >>> starts.tolist(), ends.tolist()
    ([0, 3], [3, 5])
    """
    if not len(starts):
        return starts.astype(np.int32), ends.astype(np.int32)
    starts = np.maximum.accumulate(starts)
    starts[0] = 0
    ends = np.maximum(np.maximum.accumulate(ends), np.append(starts[1:], length))
    return starts.astype(np.int32), ends.astype(np.int32)
