"""Attention: one signature over all kernels."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.blocked_attention import KEPT, blocked_attention
from sft_jax.model.context import AXIS, context_parts, gather_rows
from sft_jax.model.mask import HIDDEN, NOTHING_SEEN, MaskSpec, cap
from sft_jax.model.sharding import AnyMesh, mesh_axes_for

SHORT = 128  # rows up to which the dense kernel compiles and runs as fast


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: MaskSpec,
    kernel: str = "auto",
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    sinks: jax.Array | None = None,
    mesh: AnyMesh | None = None,
) -> jax.Array:
    """Returns softmax(q k^T) v under `mask`, [B, Lq, H, Cv] in the dtype of v.

    q is [B, Lq, H, C], k [B, Lk, K, C] and v [B, Lk, K, Cv], where K divides H and query head h reads kv head
    h // (H / K). Scores and softmax are float32. `sinks` [H] are scores of a key that every query sees and whose value
    is 0. A query that sees no key gives zeros and no gradient. Every kernel of KERNELS honours the whole mask; one that
    could not must raise. Over a `mesh` each device computes its own rows and heads, and where rows are cut over `context`
    its own queries, which are in zig-zag order then (sft_jax.model.context).
    """
    check_kernel(kernel)
    if kernel == "auto":
        kernel = auto_kernel(q.shape[1], k.shape[1])
    if mesh is not None and mesh.size > 1 and mask.parts:
        out, log_total = _over_mesh(KERNELS[kernel], q, k, v, mask, precision, mesh)
    else:
        out, log_total = KERNELS[kernel](q, k, v, mask, precision)
    if sinks is None:
        return out
    # The share of the softmax that the sink leaves: total / (total + exp(sink)).
    left = jax.nn.sigmoid(log_total - sinks.astype(jnp.float32))
    return (out.astype(jnp.float32) * left[..., None]).astype(out.dtype)


def _over_mesh(kernel: Callable, q, k, v, mask: MaskSpec, precision, mesh: AnyMesh) -> tuple[jax.Array, jax.Array]:
    """Runs `kernel` on each device. Of a row that is cut over `context` all keys and values are gathered, for one layer."""
    parts = context_parts(mesh, q.shape[1])
    rows, heads = mesh_axes_for(mesh, "batch", len(q)), mesh_axes_for(mesh, "act_kv_heads", k.shape[2])
    lengths = AXIS if parts > 1 else None
    tokens, states = P(rows, lengths), P(rows, lengths, heads)

    def local(q, k, v, positions, segments):
        own = dataclasses.replace(
            mask, query_positions=positions, key_positions=positions, query_segments=segments, key_segments=segments
        )
        if parts > 1:
            k, v, all_positions, all_segments = (gather_rows(x, parts) for x in (k, v, positions, segments))
            own = dataclasses.replace(own, key_positions=all_positions, key_segments=all_segments, parts=parts)
        return kernel(q, k, v, own, precision)

    if parts > 1:  # the backward pass gathers once more, so that whole rows of one layer are all that is ever held
        local = jax.checkpoint(local, policy=jax.checkpoint_policies.save_only_these_names(KEPT), prevent_cse=False)
    # Whether what is gathered is the same everywhere is not tracked through the loops of kernels.
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(states, states, states, tokens, tokens), out_specs=(states, states), check_vma=False
    )
    return run(q, k, v, mask.query_positions, mask.query_segments)


def check_kernel(kernel: str) -> None:
    """Raises UserError unless `kernel` is "auto" or a key of KERNELS."""
    if kernel != "auto" and kernel not in KERNELS:
        raise UserError(f"model.attention: unknown kernel '{kernel}'; {did_you_mean(kernel, ['auto', *KERNELS])}.")


def auto_kernel(queries: int, keys: int) -> str:
    """Returns the kernel that "auto" stands for: the dense one for a decoding step and for short rows."""
    return "reference" if queries == 1 or queries * keys <= SHORT * SHORT else "blocked"


def reference_attention(q, k, v, mask: MaskSpec, precision) -> tuple[jax.Array, jax.Array]:
    """Attention over the dense matrix of scores: memory grows with Lq x Lk.

    As every kernel it returns the output [B, Lq, H, Cv] and the log of the softmax's sum, fp32 [B, Lq, H], which is 0
    for a query that sees no key.
    """
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], size)
    scores = jnp.einsum("bqkgc,bskc->bkgqs", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(mask.visible()[:, None, None], cap(scores * mask.scale, mask.soft_cap), HIDDEN)
    peak = jnp.maximum(jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)), NOTHING_SEEN)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    divisor = jnp.where(total == 0.0, 1.0, total)
    log_total = jnp.where(total == 0.0, 0.0, peak + jnp.log(divisor))[..., 0]
    out = jnp.einsum("bkgqs,bskc->bqkgc", (weights / divisor).astype(v.dtype), v, precision=precision)
    return (
        out.reshape(batch, length, heads, v.shape[-1]),
        jnp.transpose(log_total, (0, 3, 1, 2)).reshape(batch, length, heads),
    )


KERNELS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference_attention,
    "blocked": blocked_attention,
}
