"""Tokens to their experts and back: sorted by expert, so that each projection is one grouped matmul, and none is dropped.

`jax.lax.ragged_dot` makes the work that of the chosen experts whatever the balance is, and a token's result does not depend
on other tokens. Where experts are cut over the mesh axis `expert`, a device gathers the tokens of all devices along that axis,
computes what its own experts give for them, and gets back the sum for its own tokens. What it must compute is known while
running only, up to everything: so it is done in rounds of a fixed number of rows, of which those that are not needed are
passed over.

Letters: N tokens, D hidden size, E experts on this device, k experts of a token, R rows of a round.
"""

import math

import jax
import jax.numpy as jnp

from sft_jax.model.layers import add_bias
from sft_jax.model.low_rank import LowRank
from sft_jax.model.mlp import gated
from sft_jax.model.options import Options
from sft_jax.model.product import grouped_product
from sft_jax.model.quant import kernel_product
from sft_jax.model.sharding import TOKENS, AnyMesh
from sft_jax.model.spec import ExpertsSpec

SPARE = 1.25  # rows of a round, where as many tokens choose a device's experts as on average need one


def mix(x, experts, weights, kernels, adapters, biases, *, spec: ExpertsSpec, options: Options, mesh: AnyMesh | None = None):
    """Returns the weighted sum of the chosen experts' outputs, like x [B, L, D].

    Called on each device of `mesh`, in a shard_map. `experts` and `weights` are those of the choice [B, L, k]; kernels,
    adapters and biases (or None) those of gate, up and down, of the device's own experts and, but for the last bias, its part of
    their inner size.
    """
    hidden, members = x.shape[-1], 1 if mesh is None else mesh.shape["expert"]
    own = tuple(y.reshape(-1, y.shape[-1]) for y in (x.astype(options.dtype), experts, weights))
    tokens, chosen, shares = own
    first = 0
    if members > 1:
        with jax.named_scope(TOKENS):
            tokens, chosen, shares = (jax.lax.all_gather(y, "expert", axis=0, tiled=True) for y in own)
        first = jax.lax.axis_index("expert") * (spec.count // members)
    y = _mix_tokens(tokens, chosen - first, shares, kernels, adapters, biases, spec, options, members)
    if members > 1:
        with jax.named_scope(TOKENS):  # its gradient is gathered
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    if mesh is not None:
        y = jax.lax.psum(y, "tensor")
    if biases is not None:  # after the sum over devices, which each hold all of it
        _, chosen, shares = own
        y = y + jnp.sum(biases[2][chosen].astype(jnp.float32) * shares[..., None], axis=1)
    return y.astype(x.dtype).reshape(*x.shape[:-1], hidden)


def _mix_tokens(tokens, chosen, shares, kernels, adapters, biases, spec: ExpertsSpec, options: Options, members: int):
    """Returns fp32 [N, D] of tokens [N, D]; `chosen` [N, k] counts from this device's first expert, others are not its own."""
    count = spec.count // members
    mine = (chosen >= 0) & (chosen < count)
    flat = jnp.where(mine, chosen, count).reshape(-1)  # those of other devices come last
    order = jnp.argsort(flat, stable=True)
    back = jnp.argsort(order).reshape(chosen.shape)
    ends = jnp.cumsum(jnp.bincount(flat, length=count + 1)[:count]).astype(jnp.int32)

    def part(start, size: int):
        """What the sorted rows from `start` on give."""
        edges = jnp.clip(ends - start, 0, size)
        sizes = jnp.diff(edges, prepend=0)
        slots = jax.lax.dynamic_slice(order, (start,), (size,))  # of tokens and choices, token by token
        # Places outside of this part are all different and lie behind it, where nothing is read or written.
        places = jnp.where(mine & (back >= start) & (back < start + size), back - start, size + back)
        rows = _rows_of(tokens, slots // spec.chosen, places)
        inside = None if members == 1 else jnp.arange(size)[:, None] < edges[-1]

        def dot(rows, kernel, axes=None):
            del axes
            return grouped_product(rows, kernel, sizes, options.dot_precision)

        def grouped(rows, kernel, adapter: LowRank | None):
            y = kernel_product(dot, rows, kernel)
            return y if adapter is None else y + adapter.added(rows, dot)

        def used(y):
            """Returns y without what a grouped matmul may leave in rows that belong to no group, which would reach gradients."""
            return y if inside is None else jnp.where(inside, y, 0)

        gate, up = (grouped(rows, kernels[i], adapters[i]) for i in (0, 1))
        if biases is not None:
            expert = jnp.minimum(flat[slots], count - 1)
            gate, up = (add_bias(y, bias[expert]) for y, bias in zip((gate, up), biases[:2], strict=True))
        out = used(grouped(gated(used(gate), used(up), spec.activation), kernels[2], adapters[2]))
        return _sums_of(out, shares, slots, places)

    if members == 1:
        return part(0, flat.size)
    size = min(math.ceil(SPARE * flat.size / members), flat.size)
    rounds = -(-flat.size // size)
    order = jnp.pad(order, (0, rounds * size - flat.size))

    def one_round(y, start):
        return jax.lax.cond(start < ends[-1], lambda: y + part(start, size), lambda: y), None

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    one_round = jax.checkpoint(one_round, prevent_cse=False)  # rows of one round at a time, in the backward pass too
    return jax.lax.scan(one_round, zeros, jnp.arange(rounds) * size)[0]


@jax.custom_vjp
def _rows_of(tokens, which, places):
    """Returns tokens[which] [R, D]; places [N, k] are where copies of each token lie in the result, if they do.

    Its gradient is gathered from there, since scattered sums have no fixed order on a GPU.
    """
    del places
    return tokens[which]


def _rows_forward(tokens, which, places):
    return _rows_of(tokens, which, places), places


def _rows_backward(places, gradient):
    copies = (_at(gradient, places[:, j]).astype(jnp.float32) for j in range(places.shape[1]))
    return sum(copies).astype(gradient.dtype), None, None


_rows_of.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def _sums_of(rows, shares, slots, places):
    """Returns fp32 [N, D], for each token the sum of its rows times its `shares` [N, k]; slots [R] are whose each row is."""
    del slots
    return sum(_at(rows, places[:, j]).astype(jnp.float32) * shares[:, j, None] for j in range(shares.shape[1]))


def _sums_forward(rows, shares, slots, places):
    return _sums_of(rows, shares, slots, places), (rows, shares, slots, places)


def _sums_backward(residuals, gradient):
    rows, shares, slots, places = residuals
    d_rows = gradient[slots // shares.shape[1]] * shares.reshape(-1)[slots][:, None]
    of_choices = [jnp.sum(_at(rows, places[:, j]).astype(jnp.float32) * gradient, axis=1) for j in range(shares.shape[1])]
    return d_rows.astype(rows.dtype), jnp.stack(of_choices, axis=1), None, None


_sums_of.defvjp(_sums_forward, _sums_backward)


def _at(rows, places):
    """Returns rows[places], 0 where there is no such row; no place comes twice."""
    return rows.at[places].get(mode="fill", fill_value=0, unique_indices=True)
