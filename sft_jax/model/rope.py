"""Rotary position embedding and its scalings."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.model.spec import DynamicScaling, LinearScaling, Llama3Scaling, LongScaling, RopeSpec, YarnScaling


class RopeTable(NamedTuple):
    """What turns queries and keys, for each token."""

    cos: jax.Array  # fp32 [B, L, 1, size / 2], times the magnitude
    sin: jax.Array
    query_scale: jax.Array | None  # fp32 [B, L, 1, 1]


def depends_on_length(spec: RopeSpec | None) -> bool:
    """Returns whether the angles of a token depend on how long its document is."""
    return spec is not None and isinstance(spec.scaling, (DynamicScaling, LongScaling))


def document_lengths(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns for every token [B, L] the length of its document as its positions tell it: the largest, plus one."""
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1) + 1


def rope_frequencies(spec: RopeSpec) -> np.ndarray:
    """Returns the angle per token of each pair of channels, float64 [size / 2], of a document of the original length.

    Computed in float64 once, so that the float32 angles are the same on every backend.
    """
    plain = _plain_frequencies(spec)
    match spec.scaling:
        case None | DynamicScaling():
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling(factor, low, high, original_length):
            # Turns within the original context: below `low` all is scaled, above `high` nothing, linear in between.
            turns = original_length * plain / (2 * math.pi)
            keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return plain * (keep + (1.0 - keep) / factor)
        case YarnScaling(factor):
            keep = 1.0 - _yarn_ramp(spec, spec.scaling)
            return plain * (keep + (1.0 - keep) / factor)
        case LongScaling(short_factors):
            return plain / np.asarray(short_factors)
    raise TypeError(f"no rope scaling {spec.scaling!r}")


def rope_table(spec: RopeSpec, positions: jax.Array, lengths: jax.Array | None = None) -> RopeTable:
    """Returns the table at `positions` [B, L].

    `lengths` [B, L], the tokens of the document that each token is in, is read where `depends_on_length(spec)`; None
    stands for documents within the original length.
    """
    frequencies = jnp.asarray(rope_frequencies(spec), jnp.float32)
    if lengths is not None and depends_on_length(spec):
        frequencies = _frequencies_by_length(spec, frequencies, lengths[..., None])[:, :, None]
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if spec.magnitude != 1.0:
        cos, sin = cos * spec.magnitude, sin * spec.magnitude
    scale = None
    if spec.query_growth is not None:
        growth = spec.query_growth
        periods = jnp.floor(positions[..., None, None].astype(jnp.float32) / growth.length)
        scale = 1.0 + growth.slope * jnp.log1p(periods)
    return RopeTable(cos, sin, scale)


def apply_rope(x: jax.Array, table: RopeTable, interleaved: bool) -> jax.Array:
    """Rotates the first channels of x [B, L, H, C] by the angles of `table`; the other channels stay."""
    size = 2 * table.cos.shape[-1]
    turned, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    first, second = first * table.cos - second * table.sin, second * table.cos + first * table.sin
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def rotate_queries(x: jax.Array, table: RopeTable, interleaved: bool) -> jax.Array:
    """As `apply_rope`, for queries, which some models also make larger with the position."""
    x = apply_rope(x, table, interleaved)
    return x if table.query_scale is None else (x * table.query_scale).astype(x.dtype)


def _plain_frequencies(spec: RopeSpec, theta: float | None = None) -> np.ndarray:
    return (theta or spec.theta) ** (-np.arange(0, spec.size, 2, dtype=np.float64) / spec.size)


def _yarn_ramp(spec: RopeSpec, scaling: YarnScaling) -> np.ndarray:
    """Returns 0 for channels that are kept, 1 for those that are divided, and what lies between, [size / 2]."""

    def channel(turns: float) -> float:
        """The channel that makes so many turns within the original length."""
        wavelengths = scaling.original_length / (turns * 2 * math.pi)
        return spec.size * math.log(wavelengths) / (2 * math.log(spec.theta))

    low, high = channel(scaling.fast_turns), channel(scaling.slow_turns)
    if scaling.whole_channels:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.size - 1)
    high = high if high != low else high + 0.001
    return np.clip((np.arange(spec.size // 2) - low) / (high - low), 0.0, 1.0)


def _frequencies_by_length(spec: RopeSpec, frequencies: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns frequencies [B, L, size / 2] for documents of `lengths` [B, L, 1] tokens."""
    if isinstance(spec.scaling, LongScaling):
        longer = jnp.asarray(_plain_frequencies(spec) / np.asarray(spec.scaling.long_factors), jnp.float32)
        return jnp.where(lengths > spec.scaling.original_length, longer, frequencies)
    factor, original = spec.scaling.factor, spec.scaling.original_length
    growth = factor * jnp.maximum(lengths, original).astype(jnp.float32) / original - (factor - 1)
    # theta becomes theta * growth ** (size / (size - 2)), to the power of -2c / size for the pair c.
    exponents = jnp.asarray(-np.arange(0, spec.size, 2) / (spec.size - 2), jnp.float32)
    return frequencies * growth**exponents
