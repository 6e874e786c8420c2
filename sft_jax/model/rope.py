"""Rotary position embedding and its scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.model.spec import LinearScaling, Llama3Scaling, RopeSpec


def rope_frequencies(spec: RopeSpec, head_size: int) -> np.ndarray:
    """Returns the angle per token of each pair of channels, float64 [head_size / 2].

    Computed in float64 once, so that the float32 angles are the same on every backend.
    """
    frequencies = spec.theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    match spec.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling(factor, low, high, original_length):
            # Turns within the original context: below `low` all is scaled, above `high` nothing, linear in between.
            turns = original_length * frequencies / (2 * math.pi)
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return frequencies * (keep + (1.0 - keep) / factor)
    raise TypeError(f"no rope scaling {spec.scaling!r}")


def rope_table(spec: RopeSpec, head_size: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of the angles at `positions` [B, L], float32 [B, L, 1, head_size / 2]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(spec, head_size).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, L, H, C] by the angles of `table`; channel c is paired with channel c + C/2."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
