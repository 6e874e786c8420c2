"""NEFTune: noise on the embeddings of tokens while training (Jain et al., arXiv:2310.05914)."""

import jax
import jax.numpy as jnp


def with_neftune(x: jax.Array, segments: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Returns embeddings `x` [B, L, D] with noise, uniform within +- strength / sqrt(n * D), n the tokens of the document.

    A document is a segment of `segments` int32 [B, L], whose tokens lie side by side; padding (0) gets no noise.
    """
    noise = jax.random.uniform(key, x.shape, jnp.float32, -1.0, 1.0)
    size = strength * jax.lax.rsqrt((document_lengths(segments) * x.shape[-1]).astype(jnp.float32))
    return (x.astype(jnp.float32) + jnp.where(segments > 0, size, 0.0)[..., None] * noise).astype(x.dtype)


def document_lengths(segments: jax.Array) -> jax.Array:
    """Returns int32 [B, L], how many tokens the segment of each position has, where it is one stretch of its row."""
    changes = segments[:, 1:] != segments[:, :-1]
    edge = jnp.ones_like(segments[:, :1], bool)
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), index, 0), axis=1)
    last_or_end = jnp.where(jnp.concatenate([changes, edge], axis=1), index, segments.shape[1])
    return jax.lax.cummin(last_or_end, axis=1, reverse=True) - first + 1
