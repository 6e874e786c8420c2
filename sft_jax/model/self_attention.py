"""The projections around attention: plain ones, and those through a latent state."""

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.model.attention import attend
from sft_jax.model.layers import Linear, Norm
from sft_jax.model.low_rank import split_key
from sft_jax.model.mask import MaskSpec
from sft_jax.model.options import Options
from sft_jax.model.rope import RopeTable, apply_rope, rotate_queries
from sft_jax.model.rounding import widened
from sft_jax.model.spec import DecoderSpec, LayerSpec, NormSpec


class Attention(nnx.Module):
    """Projections around `attend`. Heads appear by reshape only, so that every kernel stays 2-D."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, key: jax.Array, dtype, options: Options):
        keys = jax.random.split(key, 4)
        hidden, heads, kv_heads = spec.hidden_size, spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        values, mixed = spec.kv_heads * spec.value_size, spec.heads * spec.value_size
        units = {"heads": spec.heads, "kv_heads": spec.kv_heads}  # a head is never cut in two

        def linear(key, shape, axes, bias):
            return Linear(shape, axes, bias, key, spec.initializer_range, dtype, options, units)

        self.query = linear(keys[0], (hidden, heads), ("embed", "heads"), spec.query_bias)
        self.key = linear(keys[1], (hidden, kv_heads), ("embed", "kv_heads"), spec.query_bias)
        self.value = linear(keys[2], (hidden, values), ("embed", "kv_heads"), spec.query_bias)
        self.output = linear(keys[3], (mixed, hidden), ("heads", "embed"), spec.output_bias)
        sizes = {None: None, "head": (spec.head_size, spec.head_size), "projection": (heads, kv_heads)}[spec.query_key_norm]
        self.query_norm, self.key_norm = (Norm(size, spec.norm, dtype) for size in sizes) if sizes else (None, None)
        self.norm_of_heads = spec.query_key_norm == "head"
        self.sinks = new_sinks(spec, dtype)
        self.head_size, self.value_size = spec.head_size, spec.value_size
        self.rope = layer.rope
        self.options = options

    def project(
        self, x: jax.Array, table: RopeTable | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, L, H, C], keys [B, L, K, C] and values [B, L, K, Cv] of x [B, L, D]; two with rope."""
        keys = split_key(key, 3)
        heads = lambda y: y.reshape(*x.shape[:2], -1, self.head_size)  # noqa: E731
        q, k = self.query(x, keys[0]), self.key(x, keys[1])
        v = self.value(x, keys[2]).reshape(*x.shape[:2], -1, self.value_size)
        if self.query_norm is None:
            q, k = heads(q), heads(k)
        elif self.norm_of_heads:
            q, k = self.query_norm(heads(q)), self.key_norm(heads(k))
        else:
            q, k = heads(self.query_norm(q)), heads(self.key_norm(k))
        if self.rope is not None:
            q = rotate_queries(q, table, self.rope.interleaved)
            k = apply_rope(k, table, self.rope.interleaved)
        q = self.options.constrain(q, ("batch", "length", "act_heads", None))
        k = self.options.constrain(k, ("batch", "length", "act_kv_heads", None))
        return q, k, self.options.constrain(v, ("batch", "length", "act_kv_heads", None))

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, key: jax.Array | None = None) -> jax.Array:
        """Returns the attention output [B, Lq, D]."""
        return self.output(mix_heads(q, k, v, mask, self.sinks, self.options), key)


class LatentAttention(nnx.Module):
    """Attention of DeepSeek-V2 and V3: see `LatentSpec`. Keys and values are expanded before they are cached."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, key: jax.Array, dtype, options: Options):
        latent = spec.latent
        keys = jax.random.split(key, 5)
        hidden, heads = spec.hidden_size, spec.heads * spec.head_size
        norm = NormSpec("rms", latent.norm_epsilon, offset=0.0, bias=False)

        def linear(key, shape, axes, bias=False):
            return Linear(shape, axes, bias, key, spec.initializer_range, dtype, options, {"heads": spec.heads})

        # What comes up from a latent state is cut over fsdp along the latent dimension, so its axis is "embed" as well.
        if latent.query_rank is None:
            self.query = linear(keys[0], (hidden, heads), ("embed", "heads"))
        else:
            self.query_down = linear(keys[0], (hidden, latent.query_rank), ("embed", "latent"), latent.bias)
            self.query_norm = Norm(latent.query_rank, norm, dtype)
            self.query_up = linear(keys[1], (latent.query_rank, heads), ("embed", "heads"))
        down = latent.key_value_rank + latent.rope_size
        self.latent_down = linear(keys[2], (hidden, down), ("embed", "latent"), latent.bias)
        self.latent_norm = Norm(latent.key_value_rank, norm, dtype)
        up = spec.heads * (latent.plain_size + spec.value_size)
        self.latent_up = linear(keys[3], (latent.key_value_rank, up), ("embed", "heads"))
        self.output = linear(keys[4], (spec.heads * spec.value_size, hidden), ("heads", "embed"), spec.output_bias)
        self.sinks = new_sinks(spec, dtype)
        self.heads = spec.heads
        self.latent = latent
        self.rope = layer.rope
        self.options = options

    def project(
        self, x: jax.Array, table: RopeTable | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries and keys [B, L, H, C] with rope and values [B, L, H, Cv] of x [B, L, D]."""
        latent, keys = self.latent, split_key(key, 4)
        if latent.query_rank is None:
            q = self.query(x, keys[0])
        else:
            q = self.query_up(self.query_norm(self.query_down(x, keys[0])), keys[1])
        q_plain, q_rope = jnp.split(q.reshape(*x.shape[:2], self.heads, -1), [latent.plain_size], axis=-1)
        state, k_rope = jnp.split(self.latent_down(x, keys[2]), [latent.key_value_rank], axis=-1)
        expanded = self.latent_up(self.latent_norm(state), keys[3]).reshape(*x.shape[:2], self.heads, -1)
        k_plain, v = jnp.split(expanded, [latent.plain_size], axis=-1)
        k_rope = k_rope[:, :, None, :]
        if self.rope is not None:
            q_rope = rotate_queries(q_rope, table, self.rope.interleaved)
            k_rope = apply_rope(k_rope, table, self.rope.interleaved)
        q = jnp.concatenate([q_plain, q_rope], axis=-1)
        k = jnp.concatenate([k_plain, jnp.broadcast_to(k_rope, (*k_plain.shape[:-1], latent.rope_size))], axis=-1)
        return tuple(self.options.constrain(y, ("batch", "length", "act_heads", None)) for y in (q, k, v))

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec, key: jax.Array | None = None) -> jax.Array:
        """Returns the attention output [B, Lq, D]."""
        return self.output(mix_heads(q, k, v, mask, self.sinks, self.options), key)


def new_sinks(spec: DecoderSpec, dtype) -> nnx.Param | None:
    """Returns a score a head, [H], or None where the model has no sinks."""
    return nnx.Param(jnp.zeros((spec.heads,), dtype), axes=("norm",)) if spec.sinks else None


def mix_heads(q, k, v, mask: MaskSpec, sinks: nnx.Param | None, options: Options) -> jax.Array:
    """Returns what the heads read, side by side, [B, Lq, H * Cv]."""
    scores = None if sinks is None else widened(sinks[...])
    with jax.named_scope("attend"):
        out = attend(q, k, v, mask, options.attention, options.dot_precision, sinks=scores, mesh=options.mesh)
    return out.reshape(*out.shape[:2], -1)
