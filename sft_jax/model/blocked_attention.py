"""Attention in blocks: memory linear in length, and no work for blocks in which nothing is seen.

Softmax is computed online over blocks of keys (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135); the backward pass computes the scores of a block again from the log of the softmax's sum. Pure XLA:
the loop over key blocks has a trip count that is known on the device only, so packed rows pay for their own documents
and for the past, not for the square of the length.

Letters: n blocks, b rows, k kv heads, g query heads per kv head, q queries in a block, s keys in a block, c channels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sft_jax.model.mask import HIDDEN, NOTHING_SEEN, MaskSpec, cap, visible
from sft_jax.model.platform import target_platform

KEPT = "attention"  # the name of outputs that the backward pass of any kernel needs, see `jax.checkpoint_policies`
BLOCKS = {"cpu": 64}  # queries and keys in a block by platform: small ones stay in a core's cache,
BLOCK = 128  # elsewhere they should fill a matrix unit


class _Static(NamedTuple):
    """What is known when the kernel is traced."""

    causal: bool
    window: int | None
    scale: float
    soft_cap: float | None
    precision: jax.lax.Precision


class _Bounds(NamedTuple):
    """The key blocks that a query block looks at, [n] each."""

    first: jax.Array
    end: jax.Array  # one past the last


class _Side(NamedTuple):
    """Positions and segments of queries or of keys in blocks, [n, b, q]."""

    positions: jax.Array
    segments: jax.Array


def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, precision, block: int | None = None):
    """See `sft_jax.model.attention.reference_attention`. Lengths that `block` does not divide are padded."""
    block = block or block_size()
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    static = _Static(mask.causal, mask.window, mask.scale, mask.soft_cap, precision)
    queries = _Side(_blocks(mask.query_positions, block), _blocks(mask.query_segments, block))
    keys = _Side(_blocks(mask.key_positions, block), _blocks(mask.key_segments, block))
    indices = mask.query_indices()
    bounds = _key_blocks(static, queries, keys, None if indices is None else _edges(indices, block))
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    out, log_total = _attention(
        static,
        jnp.transpose(_blocks(grouped, block), (0, 1, 3, 4, 2, 5)),  # nbkgqc
        jnp.transpose(_blocks(k, block), (0, 1, 3, 2, 4)),  # nbksc
        jnp.transpose(_blocks(v, block), (0, 1, 3, 2, 4)),
        queries,
        keys,
        bounds,
    )
    out = jnp.transpose(out, (1, 0, 4, 2, 3, 5))  # b n q k g c
    log_total = jnp.transpose(log_total, (1, 0, 4, 2, 3))
    return (
        out.reshape(batch, -1, heads, v.shape[-1])[:, :length],
        log_total.reshape(batch, -1, heads)[:, :length],
    )


def block_size() -> int:
    """Returns the queries and keys in a block on the platform that is traced for."""
    return BLOCKS.get(target_platform(), BLOCK)


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """Returns x [b, L, ...] as [n, b, block, ...], padded with zeros: segment 0 is padding."""
    batch, length = x.shape[:2]
    count = -(-length // block)
    x = jnp.pad(x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, count, block, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, queries: _Side, keys: _Side, bounds: _Bounds):
    """Returns the output [n, b, k, g, q, c] and the log of the softmax's sum [n, b, k, g, q]."""
    return _forward(static, q, k, v, queries, keys, bounds)[0]


def _forward(static: _Static, q, k, v, queries: _Side, keys: _Side, bounds: _Bounds):
    """Returns what `_attention` does and what the backward pass needs."""

    def one_query_block(_, block):
        q, positions, segments, first, end = block

        def one_key_block(j, state):
            peak, total, acc = state
            scores, _ = _scores(static, q, k[j], (positions, segments), (keys.positions[j], keys.segments[j]))
            new_peak = jnp.maximum(peak, scores.max(axis=-1))
            weights = jnp.exp(scores - new_peak[..., None])  # 0 where hidden, since a peak is never near HIDDEN
            shrink = jnp.exp(peak - new_peak)
            mixed = _dot(static, "bkgqs,bksc->bkgqc", weights.astype(v.dtype), v[j])
            return new_peak, total * shrink + weights.sum(axis=-1), acc * shrink[..., None] + mixed

        rows = q.shape[:-1]
        state = jnp.full(rows, NOTHING_SEEN), jnp.zeros(rows), jnp.zeros((*rows, v.shape[-1]))
        with jax.named_scope("attention"):
            peak, total, acc = jax.lax.fori_loop(first, end, one_key_block, state)
        seen = total > 0
        out = acc / jnp.where(seen, total, 1.0)[..., None]
        return None, (out.astype(v.dtype), jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1.0)), 0.0))

    _, results = jax.lax.scan(one_query_block, None, (q, *queries, *bounds))
    out, log_total = (checkpoint_name(x, KEPT) for x in results)
    return (out, log_total), (q, k, v, queries, keys, bounds, out, log_total)


def _backward(static: _Static, residuals, gradients):
    q, k, v, queries, keys, bounds, out, log_total = residuals
    d_out, d_log_total = gradients
    # The gradient of a softmax is p * (dp - sum(p * dp)), and the sum over all keys is d_out . out; that of the log of
    # its sum is p.
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_log_total

    def one_query_block(d_kv, block):
        q, positions, segments, first, end, d_out, log_total, inner = block

        def one_key_block(j, state):
            d_q, d_k, d_v = state
            scores, slope = _scores(static, q, k[j], (positions, segments), (keys.positions[j], keys.segments[j]))
            weights = jnp.exp(scores - log_total[..., None])
            d_weights = _dot(static, "bkgqc,bksc->bkgqs", d_out, v[j])
            d_scores = (weights * (d_weights - inner[..., None]) * slope).astype(q.dtype)
            d_q += _dot(static, "bkgqs,bksc->bkgqc", d_scores, k[j])
            d_k = d_k.at[j].add(_dot(static, "bkgqs,bkgqc->bksc", d_scores, q))
            d_v = d_v.at[j].add(_dot(static, "bkgqs,bkgqc->bksc", weights.astype(v.dtype), d_out))
            return d_q, d_k, d_v

        with jax.named_scope("attention"):
            d_q, *d_kv = jax.lax.fori_loop(first, end, one_key_block, (jnp.zeros(q.shape), *d_kv))
        return tuple(d_kv), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (d_k, d_v), d_q = jax.lax.scan(one_query_block, zeros, (q, *queries, *bounds, d_out, log_total, inner))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None


_attention.defvjp(_forward, _backward)


def _scores(static: _Static, q, k, queries, keys) -> tuple[jax.Array, jax.Array | float]:
    """Returns the scores of one pair of blocks, float32 [b, k, g, q, s], and their slope in q.k."""
    scores = cap(_dot(static, "bkgqc,bksc->bkgqs", q, k) * static.scale, static.soft_cap)
    slope = static.scale
    if static.soft_cap is not None:
        slope = slope * (1.0 - jnp.square(scores / static.soft_cap))
    seen = visible(queries, keys, static.causal, static.window)[:, None, None]
    return jnp.where(seen, scores, HIDDEN), slope


def _dot(static: _Static, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=static.precision, preferred_element_type=jnp.float32)


def _key_blocks(static: _Static, queries: _Side, keys: _Side, edges: tuple[jax.Array, jax.Array] | None) -> _Bounds:
    """Returns for each query block the first key block and one past the last in which any row may see something.

    Compares the ranges of segments and positions within blocks, which can only err on the side of more blocks. `edges` are
    the first and the last key that a block of queries is, where queries are keys.
    """
    q_segments, k_segments = _ranges(queries.segments, queries.segments), _ranges(keys.segments, keys.segments)
    q_positions, k_positions = _ranges(queries.positions, queries.segments), _ranges(keys.positions, keys.segments)
    needed = (q_segments.low[:, None] <= k_segments.high) & (k_segments.low <= q_segments.high[:, None])
    if static.causal:
        needed &= k_positions.low <= q_positions.high[:, None]
    if static.window is not None:
        needed &= k_positions.high > q_positions.low[:, None] - static.window
    if edges is not None:
        # Closer than ranges: the tokens between two tokens of a document are of that document, so their distance in
        # positions is at least that in indices.
        size = keys.segments.shape[-1]
        first_query, last_query = (edge[:, None, None] for edge in edges)
        first_key = (jnp.arange(needed.shape[1]) * size)[:, None]
        unordered = ~_ordered(keys)
        if static.causal:
            needed &= (first_key <= last_query) | unordered
        if static.window is not None:
            needed &= (first_query - (first_key + size - 1) < static.window) | unordered
    needed = needed.any(axis=-1)  # over rows: they walk together
    first = jnp.argmax(needed, axis=1)
    end = needed.shape[1] - jnp.argmax(needed[:, ::-1], axis=1)
    return _Bounds(first, jnp.where(needed.any(axis=1), end, first))


def _edges(indices: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest and the largest of `indices` [L] in each block, [n]; the last block may be shorter."""
    count = -(-len(indices) // block)
    blocks = jnp.pad(indices, (0, count * block - len(indices)), mode="edge").reshape(count, block)
    return blocks.min(axis=1), blocks.max(axis=1)


def _ordered(side: _Side) -> jax.Array:
    """Returns bool [b]: documents lie one after the other, positions grow within each, and padding comes last."""
    positions, segments = (jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in side)
    before, after = segments[:, :-1], segments[:, 1:]
    grows = (after > before) | ((after == before) & (positions[:, 1:] > positions[:, :-1]))
    return (((before > 0) & grows) | (after == 0)).all(axis=1)


class _Range(NamedTuple):
    low: jax.Array  # [n, b]
    high: jax.Array


def _ranges(values: jax.Array, segments: jax.Array) -> _Range:
    """Returns the range of `values` [n, b, q] over what is not padding; an empty one where all is."""
    limits = jnp.iinfo(values.dtype)
    low = jnp.where(segments > 0, values, limits.max).min(axis=-1)
    return _Range(low, jnp.where(segments > 0, values, limits.min).max(axis=-1))
