"""Over-length: what becomes of examples that do not fit a row.

A row of `max_length` positions holds max_length + 1 tokens of a document (the last one is a target only). A policy
turns each longer example into pieces; a piece is a head (0 or more tokens from the front that are kept) and a range
[start, stop) of the example's tokens. Nothing is ever added to a piece, so a cut piece has no invented end. What is
lost is counted, in examples, tokens and supervised tokens.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from sft_jax.data.packing.corpus import Corpus
from sft_jax.data.packing.plan import ragged_arange
from sft_jax.data.stores.store import ROLES
from sft_jax.errors import UserError

_SYSTEM, _USER = ROLES.index("system"), ROLES.index("user")
_SHOWN = 5  # rows that an error names


@dataclass(frozen=True)
class Documents:
    """What is packed: pieces of examples, in the order of the examples. All arrays are int64 [documents]."""

    example: np.ndarray
    head: np.ndarray  # tokens kept from the front of the example, before `start`
    start: np.ndarray  # token offset in the example
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.example)

    @property
    def lengths(self) -> np.ndarray:
        """Positions that each document takes in a row: its tokens less one."""
        return self.head + self.stop - self.start - 1

    def select(self, keep: np.ndarray) -> "Documents":
        return Documents(*(part[keep] for part in (self.example, self.head, self.start, self.stop)))

    @staticmethod
    def concatenate(parts: "list[Documents]") -> "Documents":
        columns = zip(*((part.example, part.head, part.start, part.stop) for part in parts), strict=True)
        return Documents(*(np.concatenate(column) for column in columns))


@dataclass
class OverlengthCounts:
    """What a policy did to one set."""

    policy: str
    over_length: int = 0  # examples that do not fit
    dropped: int = 0  # of them, nothing is left
    cut: int = 0  # of them, a part is left
    split: int = 0  # of them, made into several documents
    unsupervised_pieces: int = 0  # pieces left out because nothing in them was supervised
    tokens_lost: int = 0  # positions
    supervised_tokens_lost: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Pieces(NamedTuple):
    """What is kept of over-length examples, in their order; all int64 [pieces]."""

    source: np.ndarray  # number among the over-length examples
    head: np.ndarray
    start: np.ndarray
    stop: np.ndarray


Turns = Callable[[int], tuple[np.ndarray, np.ndarray]]  # number -> (token offsets of its messages [m], role codes [m])


def _drop(lengths: np.ndarray, limit: int, turns: Turns) -> Pieces:
    """The example is left out."""
    return Pieces(*np.zeros((4, 0), np.int64))


def _truncate_left(lengths: np.ndarray, limit: int, turns: Turns) -> Pieces:
    """The last tokens stay."""
    return Pieces(np.arange(len(lengths)), np.zeros_like(lengths), lengths - limit, lengths)


def _truncate_right(lengths: np.ndarray, limit: int, turns: Turns) -> Pieces:
    """The first tokens stay."""
    zeros = np.zeros_like(lengths)
    return Pieces(np.arange(len(lengths)), zeros, zeros, np.full_like(lengths, limit))


def _keep_last_turns(lengths: np.ndarray, limit: int, turns: Turns) -> Pieces:
    """As many whole turns from the end as fit, from a user message on, behind a leading system message.

    What the template writes before the first message (BOS, say) stays too. An example whose last exchange does not
    fit, or that has no user message to begin at, is left out: half a turn would teach answers without questions.
    """
    pieces = []
    for number, tokens in enumerate(lengths.tolist()):
        starts, roles = turns(number)
        if not len(starts):
            continue
        leading_system = len(starts) > 1 and roles[0] == _SYSTEM
        head = int(starts[1] if leading_system else starts[0])
        cuts = starts[(roles == _USER) & (starts > head) & (head + tokens - starts <= limit)]
        if len(cuts):
            pieces.append((number, head, int(cuts[0]), tokens))
    return Pieces(*np.array(pieces, np.int64).reshape(-1, 4).T)


def _split(lengths: np.ndarray, limit: int, turns: Turns) -> Pieces:
    """Pieces that fit. The last token of a piece is the first of the next, so every token stays a target once."""
    counts = -(-(lengths - 1) // (limit - 1))
    source = np.repeat(np.arange(len(lengths)), counts)
    start = ragged_arange(np.zeros_like(counts), counts) * (limit - 1)
    return Pieces(source, np.zeros_like(start), start, np.minimum(start + limit, lengths[source]))


# name -> (tokens of the over-length examples, tokens that fit, their turns) -> pieces of at most that many tokens.
# "error" is the policy that allows no such example.
OVERLENGTH: dict[str, Callable[[np.ndarray, int, Turns], Pieces] | None] = {
    "error": None,
    "drop": _drop,
    "truncate_left": _truncate_left,
    "truncate_right": _truncate_right,
    "keep_last_turns": _keep_last_turns,
    "split": _split,
}


def apply_overlength(
    corpus: Corpus, set_index: int, policy: str, max_length: int, what: str = ""
) -> tuple[Documents, OverlengthCounts]:
    """Returns the documents of one set and what was lost. `what` names the set in messages.

    Raises UserError under the policy "error" when an example does not fit; it names the first rows and the remedies.
    """
    first, end = int(corpus.bases[set_index]), int(corpus.bases[set_index + 1])
    lengths, limit = corpus.lengths[first:end], max_length + 1
    too_long = np.flatnonzero(lengths > limit)
    counts = OverlengthCounts(policy, over_length=len(too_long))
    rule = OVERLENGTH[policy]
    if rule is None and len(too_long):
        what = what or f"data set '{corpus.names[set_index]}'"
        raise UserError(_error(corpus, set_index, too_long, max_length, what))
    fits = np.flatnonzero(lengths <= limit)
    zeros = np.zeros(len(fits), np.int64)
    whole = Documents(first + fits, zeros, zeros, lengths[fits])
    if not len(too_long):
        return whole, counts

    found = rule(lengths[too_long], limit, lambda number: corpus.turns(first + int(too_long[number])))
    pieces = Documents(first + too_long[found.source], found.head, found.start, found.stop)
    supervised = supervised_targets(corpus, pieces)
    kept = pieces.select(supervised > 0)
    before = Documents(first + too_long, *(np.zeros((2, len(too_long)), np.int64)), lengths[too_long])
    examples, pieces_of = np.unique(kept.example, return_counts=True)
    counts.dropped = len(too_long) - len(examples)
    counts.split = int((pieces_of > 1).sum())
    counts.cut = len(examples) - counts.split
    counts.unsupervised_pieces = len(pieces) - len(kept)
    counts.tokens_lost = int(before.lengths.sum() - kept.lengths.sum())
    counts.supervised_tokens_lost = int(supervised_targets(corpus, before).sum() - supervised[supervised > 0].sum())
    everything = Documents.concatenate([whole, kept])
    return everything.select(np.argsort(everything.example, kind="stable")), counts


def supervised_targets(corpus: Corpus, documents: Documents) -> np.ndarray:
    """Returns the supervised targets of each document, int64 [documents]; its first token is no target."""
    return _targets(documents, corpus, corpus.supervised_before)


def target_weights(corpus: Corpus, documents: Documents) -> np.ndarray:
    """Returns the sum of the target weights of each document, float64 [documents]."""
    return _targets(documents, corpus, corpus.weight_before)


def _targets(documents: Documents, corpus: Corpus, before: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    base = corpus.offsets[documents.example]
    start, stop = base + documents.start, base + documents.stop
    plain = documents.head == 0
    body = before(stop) - before(np.where(plain, start + 1, start))
    return body + np.where(plain, 0, before(base + documents.head) - before(base + 1))


def _error(corpus: Corpus, set_index: int, too_long: np.ndarray, max_length: int, what: str) -> str:
    base = int(corpus.bases[set_index])
    shown = [f"{corpus.where(base + i)} ({corpus.lengths[base + i]} tokens)" for i in too_long[:_SHOWN].tolist()]
    more = f" and {len(too_long) - _SHOWN} more" if len(too_long) > _SHOWN else ""
    others = ", ".join(name for name in OVERLENGTH if name != "error")
    longest = int(corpus.lengths[base : int(corpus.bases[set_index + 1])].max())
    return (
        f"{what}: {len(too_long):,} example(s) do not fit data.max_length {max_length}: "
        f"{', '.join(shown)}{more}; set data.max_length to {longest - 1} or more, or choose what becomes of them "
        f"with data.overlength ({others})."
    )
