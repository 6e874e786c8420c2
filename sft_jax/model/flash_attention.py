"""Attention on GPU: the Pallas kernel that comes with JAX, for plain causal layers.

Documents are isolated by their segments, and causality is by index, as in sft_jax.model.splash_attention. cuDNN's packed
layout is not used: JAX has no public way to it.
"""

import warnings

import jax
import jax.numpy as jnp

from sft_jax.model.mask import MaskSpec
from sft_jax.model.splash_attention import is_packed

BLOCK = 128  # tokens


def why_not_flash(q, k, v, mask: MaskSpec, precision, sinks) -> str | None:
    """Returns what the kernel cannot compute of global arrays, with the way out, or None."""
    if not mask.causal or mask.window is not None or mask.soft_cap is not None or sinks is not None:
        return "computes plain causal attention only: no window, soft cap or sinks"
    if q.shape[-1] != v.shape[-1]:
        return "takes keys and values of one size"
    if mask.parts > 1:
        return "takes whole rows; set mesh.context=1"
    if q.shape[1] % BLOCK or q.shape[1] != k.shape[1]:
        return f"takes rows of a multiple of {BLOCK} tokens, not {q.shape[1]}; change data.max_length"
    if q.dtype == jnp.float32 and precision != jax.lax.Precision.DEFAULT:
        return "multiplies at the default precision; set model.compute_dtype=bfloat16 or model.matmul_precision=default"
    return None


def flash_attention(q, k, v, mask: MaskSpec, precision, sinks=None, interpret: bool = False) -> jax.Array:
    """See `sft_jax.model.attention.attend`; `interpret` runs on any platform, slowly."""
    with warnings.catch_warnings():
        # JAX 0.12 still brings the kernel, but names tokamax in its place, a package that is not among ours.
        warnings.filterwarnings("ignore", "jax.experimental.pallas.ops.gpu.attention is deprecated", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as pallas  # here: slow to import, and for GPUs alone

    del precision, sinks
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    out = pallas.mha(q, k, v, mask.key_segments, sm_scale=mask.scale, causal=True, interpret=interpret)
    out = jnp.where((mask.query_segments > 0)[..., None, None], out, 0)
    return jnp.where(is_packed(mask.key_positions, mask.key_segments)[:, None, None, None], out, jnp.nan)
