"""What a query may see, as one value that every attention kernel takes."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sft_jax.model.context import own_indices

HIDDEN = -1e30  # score of a key that is not seen; finite, so that a row that sees nothing gives no NaN
NOTHING_SEEN = -1e29  # where maxima begin: no score comes near, and exp(HIDDEN - it) is 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskSpec:
    """A query sees a key of its own segment; segment 0 is padding, which sees nothing and is seen by nobody.

    `parts` above 0 promises that queries and keys are the same tokens, so that a kernel may look for rows in which
    positions grow with the index, as in packed rows, and skip there by index what causality and the window hide anyway. 1:
    all of them; n: the queries are the part of this device of n that share a row (sft_jax.model.context).
    """

    query_positions: jax.Array  # int32 [B, Lq]
    key_positions: jax.Array  # int32 [B, Lk]
    query_segments: jax.Array  # int32 [B, Lq]
    key_segments: jax.Array  # int32 [B, Lk]
    causal: bool = dataclasses.field(metadata={"static": True})  # only keys at or before the query's position
    window: int | None = dataclasses.field(metadata={"static": True})  # only keys less than this far before it
    scale: float = dataclasses.field(metadata={"static": True})  # scores are q.k * scale
    soft_cap: float | None = dataclasses.field(metadata={"static": True})  # scores become cap * tanh(scores / cap)
    parts: int = dataclasses.field(metadata={"static": True})

    def query_indices(self) -> jax.Array | None:
        """Returns int32 [Lq], which key each query is the same token as, or None where that is not said."""
        if self.parts < 2:
            return jnp.arange(self.query_positions.shape[1]) if self.parts else None
        return own_indices(self.parts, self.key_positions.shape[1])

    def visible(self) -> jax.Array:
        """Returns which keys each query sees, bool [B, Lq, Lk]."""
        queries, keys = (self.query_positions, self.query_segments), (self.key_positions, self.key_segments)
        return visible(queries, keys, self.causal, self.window)


def visible(
    queries: tuple[jax.Array, jax.Array], keys: tuple[jax.Array, jax.Array], causal: bool, window: int | None
) -> jax.Array:
    """Returns bool [B, Lq, Lk] for (positions, segments) of queries [B, Lq] and keys [B, Lk]."""
    (query_positions, query_segments), (key_positions, key_segments) = queries, keys
    seen = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :]
    if causal or window is not None:
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        if causal:
            seen &= distance >= 0
        if window is not None:
            seen &= distance < window
    return seen


def cap(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """Returns soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv:2408.00118), or the scores where there is no cap."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def segment_positions(segments: jax.Array) -> jax.Array:
    """Returns positions [B, L] that restart at 0 where a segment of `segments` [B, L] begins."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
