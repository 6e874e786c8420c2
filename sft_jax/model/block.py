"""One transformer block: attention and MLP on the residual stream."""

import jax
from flax import nnx

from sft_jax.model.attention import attend
from sft_jax.model.layers import Linear, Mlp, Norm
from sft_jax.model.mask import MaskSpec
from sft_jax.model.options import Options
from sft_jax.model.rope import apply_rope
from sft_jax.model.spec import DecoderSpec


class Attention(nnx.Module):
    """Projections around `attend`. Heads appear by reshape only, so that every kernel stays 2-D."""

    def __init__(self, spec: DecoderSpec, key: jax.Array, dtype, options: Options):
        keys = jax.random.split(key, 4)
        hidden, heads, kv_heads = spec.hidden_size, spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        units = {"heads": spec.heads, "kv_heads": spec.kv_heads}  # a head is never cut in two

        def linear(key, shape, axes, bias):
            return Linear(shape, axes, bias, key, spec.initializer_range, dtype, options, units)

        self.query = linear(keys[0], (hidden, heads), ("embed", "heads"), spec.query_bias)
        self.key = linear(keys[1], (hidden, kv_heads), ("embed", "kv_heads"), spec.query_bias)
        self.value = linear(keys[2], (hidden, kv_heads), ("embed", "kv_heads"), spec.query_bias)
        self.output = linear(keys[3], (heads, hidden), ("heads", "embed"), spec.output_bias)
        self.query_norm = Norm(spec.head_size, spec, dtype) if spec.qk_norm else None
        self.key_norm = Norm(spec.head_size, spec, dtype) if spec.qk_norm else None
        self.head_size = spec.head_size
        self.options = options

    def project(self, x: jax.Array, table) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, L, H, C], keys and values [B, L, K, C] of x [B, L, D]; the first two with rope."""
        heads = lambda y: y.reshape(*x.shape[:2], -1, self.head_size)  # noqa: E731
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q = self.options.constrain(apply_rope(q, table), ("batch", "length", "act_heads", None))
        k = self.options.constrain(apply_rope(k, table), ("batch", "length", "act_kv_heads", None))
        return q, k, self.options.constrain(v, ("batch", "length", "act_kv_heads", None))

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskSpec) -> jax.Array:
        """Returns the attention output [B, Lq, D]."""
        out = attend(q, k, v, mask, self.options.attention, self.options.dot_precision)
        return self.output(out.reshape(*out.shape[:2], -1))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `post_norms` what is added is normed as well."""

    def __init__(self, spec: DecoderSpec, key: jax.Array, dtype, options: Options):
        attention_key, mlp_key = jax.random.split(key)
        norm = lambda: Norm(spec.hidden_size, spec, dtype)  # noqa: E731
        self.attention_norm = norm()
        self.attention = Attention(spec, attention_key, dtype, options)
        self.post_attention_norm = norm() if spec.post_norms else None
        self.mlp_norm = norm()
        self.mlp = Mlp(spec, mlp_key, dtype, options)
        self.post_mlp_norm = norm() if spec.post_norms else None
        self.options = options

    def __call__(self, x: jax.Array, table, mask: MaskSpec) -> jax.Array:
        """Maps x [B, L, D] to [B, L, D]; `table` is the rope table of this kind of layer."""
        q, k, v = self.attention.project(self.attention_norm(x), table)
        return self.finish(x, self.attention.mix(q, k, v, mask))

    def finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        """Adds the attention output `mixed` and then the MLP to the residual stream x, both [B, L, D]."""
        x = x + (mixed if self.post_attention_norm is None else self.post_attention_norm(mixed))
        y = self.mlp(self.mlp_norm(x))
        x = x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y))
        return self.options.constrain(x, ("batch", "length", "act_embed"))
