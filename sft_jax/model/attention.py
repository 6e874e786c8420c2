"""Attention: one signature over all kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.blocked_attention import blocked_attention
from sft_jax.model.mask import HIDDEN, NOTHING_SEEN, MaskSpec, cap

SHORT = 128  # rows up to which the dense kernel compiles and runs as fast


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: MaskSpec,
    kernel: str = "auto",
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(q k^T) v under `mask`, [B, Lq, H, Cv] in the dtype of v.

    q is [B, Lq, H, C], k [B, Lk, K, C] and v [B, Lk, K, Cv], where K divides H and query head h reads kv head
    h // (H / K). Scores and softmax are float32. `sinks` [H] are scores of a key that every query sees and whose value
    is 0. A query that sees no key gives zeros and no gradient. Every kernel of KERNELS honours the whole mask; one that
    could not must raise.
    """
    check_kernel(kernel)
    if kernel == "auto":
        kernel = auto_kernel(q.shape[1], k.shape[1])
    out, log_total = KERNELS[kernel](q, k, v, mask, precision)
    if sinks is None:
        return out
    # The share of the softmax that the sink leaves: total / (total + exp(sink)).
    left = jax.nn.sigmoid(log_total - sinks.astype(jnp.float32))
    return (out.astype(jnp.float32) * left[..., None]).astype(out.dtype)


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
