"""What the over-length policy and the cap of a set make of each example: what is lost, in words and in numbers."""

from typing import NamedTuple

import numpy as np

from sft_jax.data.packing.overlength import Documents, apply_overlength, supervised_targets
from sft_jax.data.packing.pipeline import RowStream


class Shortened(NamedTuple):
    """Of every example of one set; all arrays are [examples]."""

    policy: str
    cap: int | None  # rows of the set that are used, at most
    max_length: int
    tokens: np.ndarray  # int64, of the whole example
    supervised: np.ndarray  # int64, supervised targets of the whole example
    pieces: np.ndarray  # int64, documents that the policy makes of it
    positions_lost: np.ndarray  # int64, by the policy; nothing of what is beyond the cap
    supervised_lost: np.ndarray  # int64, by the policy, likewise
    beyond_cap: np.ndarray  # bool, left out by the cap alone; under the policy "error", none that stops the run

    def too_long(self) -> np.ndarray:
        """Returns which examples do not fit a row, bool [examples]. A row holds max_length positions, so one token more."""
        return self.tokens > self.max_length + 1

    def problematic(self) -> np.ndarray:
        """Returns which examples have a problem: those that do not fit a row and are not beyond the cap, bool [examples]."""
        return self.too_long() & ~self.beyond_cap

    def cut(self, example: int) -> bool:
        """Returns whether an example does not fit a row."""
        return bool(self.tokens[example] > self.max_length + 1)

    def trained(self, example: int) -> int:
        """Returns how many supervised targets of an example are left."""
        return 0 if self.beyond_cap[example] else int(self.supervised[example] - self.supervised_lost[example])

    def problem(self, example: int) -> str:
        """Returns what the policy does to an example that does not fit, else ""."""
        if not self.cut(example) or self.beyond_cap[example]:
            return ""
        tokens = int(self.tokens[example])
        begin = f"has {tokens:,} tokens, and data.max_length {self.max_length} has room for {self.max_length + 1:,}: "
        if self.policy == "error":
            return f"{begin}data.overlength=error stops the run."
        pieces, lost = int(self.pieces[example]), int(self.positions_lost[example])
        supervised = int(self.supervised_lost[example])
        if not pieces:
            return f"{begin}data.overlength={self.policy} leaves it out, with {supervised:,} supervised tokens."
        if pieces > 1:
            losing = f", without {lost:,} tokens, {supervised:,} of them supervised" if lost else ""
            return f"{begin}data.overlength={self.policy} makes {pieces} documents of it{losing}."
        return f"{begin}data.overlength={self.policy} cuts off {lost:,} tokens, {supervised:,} of them supervised."

    def note(self, example: int) -> str:
        """Returns why an example that has no problem is not in the run, else ""."""
        return f"beyond the cap: it is not in the sample of {self.cap:,} rows of its set." if self.beyond_cap[example] else ""


def shortened(stream: RowStream, index: int, policy: str, cap: int | None) -> Shortened:
    """Returns what has become of the examples of set `index` of a stream.

    Args:
        policy, cap: as configured; under the policy "error" nothing counts as lost, since there is no run, and the stream
            is one of "split".
    """
    corpus, documents = stream.corpus, stream.documents
    first, end = corpus.bases[index : index + 2].tolist()
    tokens = corpus.lengths[first:end]
    zeros = np.zeros(end - first, np.int64)
    supervised = supervised_targets(corpus, Documents(np.arange(first, end), zeros, zeros, tokens))
    used = documents.select((documents.example >= first) & (documents.example < end))
    made = used  # by the policy
    if cap is not None:
        made, _ = apply_overlength(corpus, index, "split" if policy == "error" else policy, stream.max_length, corpus.names[index])

    def total(documents: Documents, amounts: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(documents.example - first, amounts, minlength=end - first).astype(np.int64)

    pieces = total(made)
    beyond_cap = (pieces > 0) & (total(used) == 0)
    if policy == "error":
        beyond_cap &= tokens <= stream.max_length + 1
        return Shortened(policy, cap, stream.max_length, tokens, supervised, pieces, zeros, zeros, beyond_cap)
    lost = ~beyond_cap * (tokens - 1 - total(made, made.lengths))
    lost_supervised = ~beyond_cap * (supervised - total(made, supervised_targets(corpus, made)))
    return Shortened(policy, cap, stream.max_length, tokens, supervised, pieces, lost, lost_supervised, beyond_cap)
