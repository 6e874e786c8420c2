"""What the over-length policy and the cap of a set make of each example: what is lost, in words and in numbers."""

from typing import NamedTuple

import numpy as np

from sft_jax.data.packing.overlength import Documents, supervised_targets
from sft_jax.data.packing.pipeline import RowStream


class Shortened(NamedTuple):
    """Of every example of one set; all arrays are [examples]."""

    policy: str
    cap: int | None  # rows of the set that are used, at most
    max_length: int
    tokens: np.ndarray  # int64, of the whole example
    supervised: np.ndarray  # int64, supervised targets of the whole example
    pieces: np.ndarray  # int64, documents that are made of it
    positions_lost: np.ndarray  # int64, by the policy
    supervised_lost: np.ndarray  # int64, by the policy

    def too_long(self) -> np.ndarray:
        """Returns which examples do not fit a row, bool [examples]. A row holds max_length positions, so one token more."""
        return self.tokens > self.max_length + 1

    def problematic(self) -> np.ndarray:
        """Returns which examples have a problem, bool [examples]."""
        return self.too_long() | (self.pieces == 0 if self.cap is not None else False)

    def cut(self, example: int) -> bool:
        """Returns whether the policy changes an example."""
        return bool(self.tokens[example] > self.max_length + 1)

    def trained(self, example: int) -> int:
        """Returns how many supervised targets of an example are left."""
        return int(self.supervised[example] - self.supervised_lost[example]) if self.pieces[example] or self.cap is None else 0

    def problem(self, example: int) -> str:
        """Returns what the policy does to an example that does not fit, or that the cap leaves it out, else ""."""
        tokens = int(self.tokens[example])
        if not self.cut(example):
            left_out = self.cap is not None and not self.pieces[example]
            return f"is not in the sample of {self.cap:,} rows that the cap of its set takes." if left_out else ""
        begin = f"has {tokens:,} tokens, and data.max_length {self.max_length} has room for {self.max_length + 1:,}: "
        if self.policy == "error":
            return f"{begin}data.overlength=error stops the run."
        pieces, lost = int(self.pieces[example]), int(self.positions_lost[example])
        supervised = int(self.supervised_lost[example])
        if not pieces and self.cap is not None and self.policy != "drop":
            return f"{begin}data.overlength={self.policy} leaves it out, or the cap of its set, with {int(self.supervised[example]):,} supervised tokens."
        if not pieces:
            return f"{begin}data.overlength={self.policy} leaves it out, with {supervised:,} supervised tokens."
        if pieces > 1:
            losing = f", without {lost:,} tokens, {supervised:,} of them supervised" if lost else ""
            return f"{begin}data.overlength={self.policy} makes {pieces} documents of it{losing}."
        return f"{begin}data.overlength={self.policy} cuts off {lost:,} tokens, {supervised:,} of them supervised."


def shortened(stream: RowStream, index: int, policy: str, cap: int | None) -> Shortened:
    """Returns what has become of the examples of set `index` of a stream.

    Args:
        policy, cap: as configured; under the policy "error" nothing counts as lost, since there is no run.
    """
    corpus, documents = stream.corpus, stream.documents
    first, end = corpus.bases[index : index + 2].tolist()
    tokens = corpus.lengths[first:end]
    zeros = np.zeros(end - first, np.int64)
    supervised = supervised_targets(corpus, Documents(np.arange(first, end), zeros, zeros, tokens))
    own = documents.select((documents.example >= first) & (documents.example < end))
    place = own.example - first

    def total(amounts: np.ndarray | None) -> np.ndarray:
        return np.bincount(place, amounts, minlength=end - first).astype(np.int64)

    if policy == "error":
        return Shortened(policy, cap, stream.max_length, tokens, supervised, total(None), zeros, zeros)
    kept, kept_supervised = total(own.lengths), total(supervised_targets(corpus, own))
    pieces = total(None)
    there = (pieces > 0) | (tokens > stream.max_length + 1)  # else the cap has left it out
    lost, lost_supervised = there * (tokens - 1 - kept), there * (supervised - kept_supervised)
    return Shortened(policy, cap, stream.max_length, tokens, supervised, pieces, lost, lost_supervised)
