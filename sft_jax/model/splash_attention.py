"""Attention on TPU: the splash kernel that comes with JAX, under our mask.

It sees causality and the window by index, and documents by their segments. In a packed row both ways to count distances
are one, since positions grow by one within a document; a row in which they do not, or whose documents are no single
stretches, gives NaN, because nothing else could be told while it runs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.model.blocked_attention import KEPT
from sft_jax.model.context import AXIS, zigzag_order
from sft_jax.model.mask import MaskSpec
from sft_jax.model.rounding import widened

LANES = 128  # lengths are cut into multiples of it
BLOCKS = (512, 256, LANES)  # queries and keys in a block, the largest that divides their length


def why_not_splash(q, k, v, mask: MaskSpec, precision, sinks) -> str | None:
    """Returns what the kernel cannot compute of global arrays, with the way out, or None."""
    del v, sinks
    if not mask.causal:
        return "sees only keys at or before a query"
    if (q.shape[1] // mask.parts) % LANES or k.shape[1] % LANES:
        share = "" if mask.parts == 1 else f" on each of the {mask.parts} devices along mesh.context"
        return f"takes rows of a multiple of {LANES} tokens{share}, not {q.shape[1]}; change data.max_length"
    if q.dtype == jnp.float32 and precision != jax.lax.Precision.DEFAULT:
        return "multiplies at the default precision; set model.compute_dtype=bfloat16 or model.matmul_precision=default"
    return None


def splash_attention(q, k, v, mask: MaskSpec, precision, sinks=None, interpret: bool = False) -> jax.Array:
    """See `sft_jax.model.attention.attend`; `interpret` runs on any platform, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # here: slow to import, and for TPUs alone

    del precision
    heads, keys = q.shape[2], k.shape[1]
    kernel = _kernel(heads, keys, mask.parts, mask.window, mask.soft_cap, interpret)
    if mask.parts > 1:  # what it knows of the queries of each device lies side by side
        here = jax.lax.axis_index(AXIS)
        kernel = jax.tree.map(lambda x: _part(jnp.asarray(x), here, mask.parts), kernel)
    scaled = (q.astype(jnp.float32) * mask.scale).astype(q.dtype)
    by_head = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    sinks = None if sinks is None else widened(sinks)  # the kernel gives their gradient in the dtype of q
    segments = SegmentIds(mask.query_segments, mask.key_segments)
    out = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segments, sinks))(*by_head, segments)
    out = jnp.swapaxes(out, 1, 2).astype(v.dtype)
    out = jnp.where((mask.query_segments > 0)[..., None, None], out, 0)
    return jnp.where(is_packed(mask.key_positions, mask.key_segments)[:, None, None, None], out, jnp.nan)


def is_packed(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns bool [B]: each document is one stretch, in which positions grow by one, and padding comes last."""
    before, after = segments[:, :-1], segments[:, 1:]
    grows = (after > before) | ((after == before) & (positions[:, 1:] == positions[:, :-1] + 1))
    return (((before > 0) & grows) | (after == 0)).all(axis=1)


@functools.lru_cache(maxsize=32)
def _kernel(heads: int, length: int, parts: int, window: int | None, soft_cap: float | None, interpret: bool):
    """Returns the kernel for rows of `length` tokens whose queries `parts` devices share; its arrays are numpy's."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    if parts > 1:
        mask.q_sequence = zigzag_order(parts, length)
    rows, columns = (next(block for block in BLOCKS if size % block == 0) for size in (length // parts, length))
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=parts,
            attn_logits_soft_cap=soft_cap, residual_checkpoint_name=KEPT, interpret=interpret,
        )  # fmt: skip
        return jax.tree.map(np.asarray, kernel)


def _part(x: jax.Array, here, parts: int) -> jax.Array:
    """Returns a device's share of an array of the kernel's, [heads, queries, ...] or [queries], in blocks or not."""
    axis = min(x.ndim - 1, 1)
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, here * size, size, axis)
