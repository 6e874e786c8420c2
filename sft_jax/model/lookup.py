"""Rows of a table [V, D] by token, without any device holding the table or its gradient whole.

Over a mesh a device holds some rows of the table (cut over `tensor`) and, of these, some columns (cut over the axes of the
hidden size, over which tokens are cut as well). It looks up the tokens of all devices that hold other columns of the same rows,
and sends each of them the columns that it has; gradients go the same way back and are summed where the parameter lies. So
what travels are hidden states, of which a device has thousands, not a table of a hundred thousand rows.

Letters: B rows, L length, n tokens of a device, V vocabulary, D hidden size, d columns of a device, M devices whose tokens it
looks up, K devices that look up the same tokens in other columns.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from sft_jax.model.rounding import rounded
from sft_jax.model.sharding import TOKENS, AnyMesh, mesh_axes_for


def look_up(
    table: jax.Array, tokens: jax.Array, dtype, axes: tuple[str | None, str | None], mesh: AnyMesh | None = None
) -> jax.Array:
    """Returns table[tokens], [B, L, D] in `dtype`, of a table [V, D] with logical `axes` and int tokens [B, L].

    A token that is not within 0 and V - 1 gives NaN and no gradient. The table's gradient is summed in float32, over tokens
    and devices, and then rounded to its dtype.
    """
    cut = None if mesh is None or mesh.size == 1 else _cut(axes, table.shape, tokens.shape, mesh)
    return _look_up(_Static(cut, np.dtype(dtype), table.shape[0], table.dtype), table, tokens)


class _Cut(NamedTuple):
    """How table and tokens are cut over a mesh; each is a tuple of mesh axes."""

    mesh: AnyMesh
    batch: tuple[str, ...]
    length: tuple[str, ...]
    vocab: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def table(self) -> P:
        return P(self.vocab, self.columns)

    @property
    def rows(self) -> P:
        return P(self.batch, self.length)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Axes over which tokens and columns are cut: M devices."""
        return tuple(name for name in self.columns if name in (*self.batch, *self.length))

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes over which columns are cut but not tokens, such as those of a batch of one prompt: K devices."""
        return tuple(name for name in self.columns if name not in self.exchanged)

    @property
    def copies(self) -> tuple[str, ...]:
        """Axes over which tokens are cut but not the table, so that gradients are summed over them."""
        return tuple(name for name in (*self.batch, *self.length) if name not in self.columns)


class _Static(NamedTuple):
    cut: _Cut | None
    dtype: np.dtype
    vocab: int
    table_dtype: np.dtype


def _cut(axes, table_shape, tokens_shape, mesh: AnyMesh) -> _Cut:
    vocab, columns = (
        () if axis is None else mesh_axes_for(mesh, axis, size) for axis, size in zip(axes, table_shape, strict=True)
    )
    batch, length = (mesh_axes_for(mesh, axis, size) for axis, size in zip(("batch", "length"), tokens_shape, strict=True))
    return _Cut(mesh, batch, length, vocab, columns)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(static: _Static, table, tokens):
    cut = static.cut
    if cut is None:
        return _taken(table, tokens, 0, jnp.nan).astype(static.dtype)

    def local(table, tokens):
        first = _first_row(cut, len(table))
        x = _taken(table, _all_tokens(cut, tokens), first, 0 if cut.vocab else jnp.nan).astype(static.dtype)
        if not cut.vocab:
            return _own_states(cut, x, tokens.shape)
        x = _own_states(cut, lax.psum(x, cut.vocab), tokens.shape)  # one of the devices has the row, the others have zeros
        return jnp.where(((tokens >= 0) & (tokens < static.vocab))[..., None], x, jnp.nan)

    return jax.shard_map(
        local, mesh=cut.mesh, in_specs=(cut.table, cut.rows), out_specs=cut.rows, check_vma=False
    )(table, tokens)  # fmt: skip


def _forward(static: _Static, table, tokens):
    return _look_up(static, table, tokens), tokens


def _backward(static: _Static, tokens, gradient):
    cut = static.cut
    if cut is None:
        return rounded(_summed(gradient, tokens, 0, static.vocab), static.table_dtype), None

    def local(tokens, gradient):
        rows = static.vocab // lax.axis_size(cut.vocab) if cut.vocab else static.vocab
        sums = _summed(_all_states(cut, gradient), _all_tokens(cut, tokens), _first_row(cut, rows), rows)
        return rounded(lax.psum(sums, cut.copies) if cut.copies else sums, static.table_dtype)

    return jax.shard_map(
        local, mesh=cut.mesh, in_specs=(cut.rows, cut.rows), out_specs=cut.table, check_vma=False
    )(tokens, gradient), None  # fmt: skip


_look_up.defvjp(_forward, _backward)


def _taken(table, tokens, first_row, outside):
    """Returns table[tokens - first_row], `outside` where there is no such row."""
    return table.at[_within(tokens, first_row, len(table))].get(mode="fill", fill_value=outside)


def _summed(gradient, tokens, first_row, rows: int):
    """Returns fp32 [rows, d], for each row the sum of the gradients [..., d] of its tokens."""
    sums = jnp.zeros((rows, gradient.shape[-1]), jnp.float32)
    return sums.at[_within(tokens, first_row, rows)].add(gradient.astype(jnp.float32), mode="drop")


def _within(tokens, first_row, rows: int):
    """Returns tokens - first_row, and `rows` for those that are not within the rows: an index below 0 would count from the end."""
    index = tokens - first_row
    return jnp.where((index >= 0) & (index < rows), index, rows)


# What follows is called on each device, in a shard_map.
def _first_row(cut: _Cut, rows: int):
    return lax.axis_index(cut.vocab) * rows if cut.vocab else 0


def _all_tokens(cut: _Cut, tokens):
    """Returns [M, n]: the tokens of all devices that hold other columns."""
    flat = tokens.reshape(-1)
    with jax.named_scope(TOKENS):
        return lax.all_gather(flat, cut.exchanged) if cut.exchanged else flat[None]


def _own_states(cut: _Cut, x, shape):
    """Returns all columns [*shape, D] of the tokens of this device, from own columns [M, n, d] of the tokens of all."""
    if cut.exchanged:
        x = lax.all_to_all(x, cut.exchanged, split_axis=0, concat_axis=0)  # [M, n, d]: other columns, own tokens
    with jax.named_scope(TOKENS):
        x = lax.all_gather(x, cut.gathered) if cut.gathered else x[None]
    order = (2, 0, 1, 3) if _gathered_first(cut) else (2, 1, 0, 3)
    return x.transpose(order).reshape(*shape, -1)


def _all_states(cut: _Cut, x):
    """The inverse for gradients: own columns [M, n, d] of the tokens of all devices, from all columns [..., D] of own tokens."""
    others = lax.axis_size(cut.exchanged) if cut.exchanged else 1
    same = lax.axis_size(cut.gathered) if cut.gathered else 1
    parts = (same, others) if _gathered_first(cut) else (others, same)
    x = x.reshape(-1, *parts, x.shape[-1] // (others * same))
    if cut.gathered:
        x = lax.dynamic_index_in_dim(x, lax.axis_index(cut.gathered), axis=1 if _gathered_first(cut) else 2, keepdims=False)
    x = x.reshape(len(x), others, -1).transpose(1, 0, 2)
    return lax.all_to_all(x, cut.exchanged, split_axis=0, concat_axis=0) if cut.exchanged else x


def _gathered_first(cut: _Cut) -> bool:
    """Whether the axes that are gathered cut columns into larger pieces than those that are exchanged."""
    return bool(cut.gathered) and cut.columns[0] == cut.gathered[0]
