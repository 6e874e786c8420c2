"""Batch: what the data side hands to the model side, and the invariants it keeps."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Packed rows of next-token examples. A pytree without importing jax.

    The next-token shift has been done: `targets[b, t]` is the token that follows `tokens[b, t]` in its document.
    `weights` is the only loss mask; `segments` only separates documents (0 is padding). Neither is ever inferred
    from a token id.

    Example, one row of length 8 that holds the documents [5 6 7] (7 supervised) and [8 9] (9 supervised):

        tokens     5 6 8 0 0 0 0 0
        targets    6 7 9 0 0 0 0 0
        weights    0 1 1 0 0 0 0 0
        segments   1 1 2 0 0 0 0 0
        positions  0 1 0 0 0 0 0 0
        examples   e0 e1 -1 -1          (max_segments 4)
    """

    tokens: np.ndarray  # int32 [B, L]
    targets: np.ndarray  # int32 [B, L]
    weights: np.ndarray  # float32 [B, L], 0 = not supervised
    segments: np.ndarray  # int32 [B, L], 1, 2, ... per row; 0 = padding
    positions: np.ndarray  # int32 [B, L], restart at 0 in every segment
    examples: np.ndarray  # int32 [B, max_segments], example of segment s at [:, s - 1]; -1 = no such segment


def empty_batch(rows: int, max_length: int, max_segments: int) -> Batch:
    """Returns a batch of `rows` rows that hold nothing but padding."""
    shape = (rows, max_length)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        segments=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        examples=np.full((rows, max_segments), -1, np.int32),
    )


def check_batch(batch: Batch) -> None:
    """Raises AssertionError where a batch breaks an invariant of the data side; used by tests and selfcheck."""
    rows, length = batch.tokens.shape
    for name in ("targets", "weights", "segments", "positions"):
        assert getattr(batch, name).shape == (rows, length), name
    assert (batch.weights[batch.segments == 0] == 0).all(), "padding is supervised"
    assert (batch.weights >= 0).all() and np.isfinite(batch.weights).all(), "a weight is negative or not finite"
    for row in range(rows):
        segments, positions = batch.segments[row], batch.positions[row]
        used = segments[segments > 0]
        assert (np.flatnonzero(segments > 0) == np.arange(len(used))).all(), "padding between documents"
        steps = np.diff(used)
        assert len(used) == 0 or (used[0] == 1 and ((steps == 0) | (steps == 1)).all()), "segments do not count up"
        starts = np.flatnonzero(np.diff(segments, prepend=0))
        expected = np.arange(length) - np.repeat(starts, np.diff(np.append(starts, length))) if len(starts) else None
        assert expected is None or (positions == np.where(segments > 0, expected, 0)).all(), "positions do not restart"
        count = used[-1] if len(used) else 0
        assert (batch.examples[row, :count] >= 0).all() and (batch.examples[row, count:] == -1).all(), "examples"
