"""One transformer block: attention and MLP on the residual stream."""

import jax
from flax import nnx

from sft_jax.model.experts import Experts, Routed
from sft_jax.model.layers import Norm
from sft_jax.model.low_rank import split_key
from sft_jax.model.mask import MaskSpec
from sft_jax.model.mlp import Mlp
from sft_jax.model.options import Options
from sft_jax.model.rope import RopeTable
from sft_jax.model.self_attention import Attention, LatentAttention
from sft_jax.model.spec import DecoderSpec, ExpertsSpec, LayerSpec


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    With `post_norms` what is added is normed as well, without `pre_norms` it alone; a `parallel` block has one norm, and
    adds what attention and MLP make of it at once.
    """

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, key: jax.Array, dtype, options: Options):
        attention_key, mlp_key = jax.random.split(key)
        norm = lambda wanted: Norm(spec.hidden_size, spec.norm, dtype) if wanted else None  # noqa: E731
        self.attention_norm = norm(spec.pre_norms)
        attention = Attention if spec.latent is None else LatentAttention
        self.attention = attention(spec, layer, attention_key, dtype, options)
        self.post_attention_norm = norm(spec.post_norms)
        self.mlp_norm = norm(spec.pre_norms and not spec.parallel)
        mlp = Experts if isinstance(layer.mlp, ExpertsSpec) else Mlp
        self.mlp = mlp(layer.mlp, spec.hidden_size, mlp_key, spec.initializer_range, dtype, options)
        self.post_mlp_norm = norm(spec.post_norms)
        self.parallel = spec.parallel
        self.residual_scale = spec.residual_scale
        self.options = options

    def __call__(
        self,
        x: jax.Array,
        table: RopeTable | None,
        mask: MaskSpec,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routed | None]:
        """Maps x [B, L, D] to [B, L, D]; `table` is the rope table of this kind of layer, `key` that of dropout.

        With `segments` [B, L] a layer of experts also returns how it routed the tokens, per document.
        """
        project_key, mix_key, mlp_key = split_key(key, 3)
        normed = self.enter(x)
        q, k, v = self.attention.project(normed, table, project_key)
        return self.finish(x, normed, self.attention.mix(q, k, v, mask, mix_key), segments, mlp_key)

    def enter(self, x: jax.Array) -> jax.Array:
        """Returns what attention reads of the residual stream x."""
        return x if self.attention_norm is None else self.attention_norm(x)

    def finish(
        self,
        x: jax.Array,
        normed: jax.Array,
        mixed: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routed | None]:
        """Adds the attention output `mixed` and the MLP to the residual stream x, all [B, L, D]; `normed` is `enter(x)`."""
        x = self._add(x, mixed, self.post_attention_norm)
        if not self.parallel:
            normed = x if self.mlp_norm is None else self.mlp_norm(x)
        if isinstance(self.mlp, Experts):
            y, routed = self.mlp(normed, segments, key)
        else:
            y, routed = self.mlp(normed, key), None
        x = self._add(x, y, self.post_mlp_norm)
        return self.options.constrain(x, ("batch", "length", "act_embed")), routed

    def _add(self, x: jax.Array, y: jax.Array, norm: Norm | None) -> jax.Array:
        y = y if norm is None else norm(y)
        return x + (y if self.residual_scale == 1.0 else y * self.residual_scale)
