"""Embeddings of some tokens that are trained although the table stays as it is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict


class TokenRows(nnx.Module):
    """Stands for rows `ids` of a table [V, D], the embedding or the transposed head; float32."""

    def __init__(self, rows: jax.Array, ids: tuple[int, ...], vocab_rows: int):
        """`rows` [n, D] are those of the table to begin with; `ids` ascend."""
        self.rows = nnx.Param(rows, axes=(None, "embed"), units=FrozenDict(), exact=True)
        self.ids = ids
        self.vocab_rows = vocab_rows

    def replace_in(self, x: jax.Array, tokens: jax.Array, look_up: Callable[[nnx.Param, jax.Array], jax.Array]) -> jax.Array:
        """Returns embeddings x [B, L, D] of `tokens` [B, L] with those of the trained rows, which `look_up` finds by index."""
        slots = np.full(self.vocab_rows, -1, np.int32)
        slots[list(self.ids)] = np.arange(len(self.ids))
        slot = jnp.asarray(slots).at[tokens].get(mode="fill", fill_value=-1)
        return jnp.where((slot >= 0)[..., None], look_up(self.rows, slot), x)

    def head_product(self, hidden: jax.Array, table_rows: jax.Array, vocab_axis: int, dot) -> tuple[jax.Array, jax.Array]:
        """Returns (states [..., n], kernel [n, V] or [V, n]) whose product these rows add to the logits.

        `table_rows` [n, D] are those that they stand for. As a term of its own, so that neither the head nor its
        gradient is copied for a few rows.
        """
        states = dot(hidden, (self.rows[...] - table_rows.astype(jnp.float32)).T, self.rows.axes[::-1])
        columns = jnp.arange(self.vocab_rows)[:, None] == jnp.asarray(self.ids)
        kernel = columns.astype(hidden.dtype)
        return states, kernel if vocab_axis == 0 else kernel.T

    def merged(self, table: jax.Array) -> jax.Array:
        """Returns the table [V, D] with the trained rows in it, in its dtype."""
        return table.at[jnp.asarray(self.ids)].set(self.rows[...].astype(table.dtype))
