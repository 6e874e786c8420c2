"""Attention: one signature over all kernels."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.blocked_attention import KEPT, blocked_attention
from sft_jax.model.context import AXIS, context_parts, gather_rows
from sft_jax.model.flash_attention import flash_attention, why_not_flash
from sft_jax.model.mask import HIDDEN, NOTHING_SEEN, MaskSpec, cap
from sft_jax.model.platform import target_platform
from sft_jax.model.sharding import AnyMesh, mesh_axes_for
from sft_jax.model.splash_attention import splash_attention, why_not_splash

SHORT = 128  # rows up to which the dense kernel compiles and runs as fast


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention."""

    run: Callable[..., jax.Array]  # (q, k, v, mask, precision, sinks) -> out; on one device, or on each in a shard_map
    platform: str | None = None  # the only one that it runs on; such a kernel reads rows of tokens, not a cache
    why_not: Callable[..., str | None] = lambda *_: None  # (q, k, v, mask, precision, sinks) -> what it cannot compute
    auto: bool = True  # "auto" may take it


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
    h // (H / K). Scores and softmax are float32. `sinks` [H], float32, are scores of a key that every query sees and whose value
    is 0. A query that sees no key gives zeros and no gradient. Every kernel of KERNELS honours the whole mask; one that
    cannot raises UserError. Over a `mesh` each device computes its own rows and heads, and where rows are cut over
    `context` its own queries, which are in zig-zag order then (sft_jax.model.context).
    """
    check_kernel(kernel)
    platform = platform_of(mesh)
    parts = 1 if mesh is None or not mask.parts else context_parts(mesh, q.shape[1])
    shape = dataclasses.replace(mask, parts=parts) if mask.parts else mask
    chosen = KERNELS[choose_kernel(kernel, platform, q, k, v, shape, precision, sinks)]
    if mesh is not None and mesh.size > 1 and mask.parts:
        return _over_mesh(chosen.run, parts, q, k, v, mask, precision, sinks, mesh)
    return chosen.run(q, k, v, mask, precision, sinks)


def choose_kernel(kernel: str, platform: str, q, k, v, mask: MaskSpec, precision, sinks) -> str:
    """Returns the kernel that `kernel` stands for; raises UserError where it cannot compute this."""
    if kernel != "auto":
        chosen = KERNELS[kernel]
        if chosen.platform is None:
            return kernel
        if mask.parts:
            if chosen.platform != platform:
                raise UserError(
                    f"model.attention: '{kernel}' runs on {chosen.platform} only, and these devices are {platform}; use auto."
                )
            reason = chosen.why_not(q, k, v, mask, precision, sinks)
            if reason:
                raise UserError(f"model.attention: '{kernel}' {reason}; or use auto.")
            return kernel
    if q.shape[1] == 1 or q.shape[1] * k.shape[1] <= SHORT * SHORT:  # a decoding step, or short rows
        return "reference"
    own = [name for name, other in KERNELS.items() if other.platform == platform and other.auto and mask.parts]
    return next((name for name in own if not KERNELS[name].why_not(q, k, v, mask, precision, sinks)), "blocked")


def check_kernel(kernel: str) -> None:
    """Raises UserError unless `kernel` is "auto" or a key of KERNELS."""
    if kernel != "auto" and kernel not in KERNELS:
        raise UserError(f"model.attention: unknown kernel '{kernel}'; {did_you_mean(kernel, ['auto', *KERNELS])}.")


def platform_of(mesh: AnyMesh | None) -> str:
    """Returns "cpu", "gpu" or "tpu": of the devices of `mesh`, which need not be attached, else what is traced for."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else target_platform()


def _over_mesh(run: Callable, parts: int, q, k, v, mask: MaskSpec, precision, sinks, mesh: AnyMesh) -> jax.Array:
    """Runs a kernel on each device. Of a row that is cut over `context` all keys and values are gathered, for one layer."""
    rows, heads = mesh_axes_for(mesh, "batch", len(q)), mesh_axes_for(mesh, "act_kv_heads", k.shape[2])
    lengths = AXIS if parts > 1 else None
    tokens, states = P(rows, lengths), P(rows, lengths, heads)

    def local(q, k, v, positions, segments, sinks):
        own = dataclasses.replace(
            mask, query_positions=positions, key_positions=positions, query_segments=segments, key_segments=segments
        )
        if parts > 1:
            k, v, all_positions, all_segments = (gather_rows(x, parts) for x in (k, v, positions, segments))
            own = dataclasses.replace(own, key_positions=all_positions, key_segments=all_segments, parts=parts)
        return run(q, k, v, own, precision, sinks)

    if parts > 1:  # the backward pass gathers once more, so that whole rows of one layer are all that is ever held
        local = jax.checkpoint(local, policy=jax.checkpoint_policies.save_only_these_names(KEPT), prevent_cse=False)
    # Whether what is gathered is the same everywhere is not tracked through the loops of kernels.
    over_devices = jax.shard_map(
        local, mesh=mesh, in_specs=(states, states, states, tokens, tokens, P(heads)), out_specs=states, check_vma=False
    )
    return over_devices(q, k, v, mask.query_positions, mask.query_segments, sinks)


def reference_attention(q, k, v, mask: MaskSpec, precision) -> tuple[jax.Array, jax.Array]:
    """Attention over the dense matrix of scores: memory grows with Lq x Lk.

    It returns the output [B, Lq, H, Cv] and the log of the softmax's sum, fp32 [B, Lq, H], which is 0
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


def _with_sinks(kernel: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., jax.Array]:
    """Makes a kernel that gives the output and the log of the softmax's sum one that gives the output with sinks."""

    @functools.wraps(kernel)
    def run(q, k, v, mask: MaskSpec, precision, sinks=None) -> jax.Array:
        out, log_total = kernel(q, k, v, mask, precision)
        if sinks is None:
            return out
        # The share of the softmax that the sink leaves: total / (total + exp(sink)).
        left = jax.nn.sigmoid(log_total - sinks)
        return (out.astype(jnp.float32) * left[..., None]).astype(out.dtype)

    return run


KERNELS: dict[str, Kernel] = {
    "reference": Kernel(_with_sinks(reference_attention)),
    "blocked": Kernel(_with_sinks(blocked_attention)),
    "splash": Kernel(splash_attention, "tpu", why_not_splash),
    "flash": Kernel(flash_attention, "gpu", why_not_flash, auto=False),  # until its test has run on a GPU
}
