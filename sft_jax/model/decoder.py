"""The decoder of every family: embedding, scanned runs of blocks, final norm, head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.attention import check_kernel
from sft_jax.model.block import Block
from sft_jax.model.cache import Cache, new_cache
from sft_jax.model.decoding import extend
from sft_jax.model.layers import Embed, Linear, Norm
from sft_jax.model.mask import MaskSpec, cap, segment_positions
from sft_jax.model.neftune import with_neftune
from sft_jax.model.options import Options
from sft_jax.model.rope import rope_table
from sft_jax.model.runs import plan_runs
from sft_jax.model.spec import DecoderSpec, LayerSpec

# What the backward pass keeps of a period of blocks; the rest is computed again. None: everything is kept.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nnx.Module):
    """A decoder-only transformer. Never changes after construction; a pytree of its parameters.

    Parameters by path, where r and p are the run and the place in its period (sft_jax.model.runs), and everything
    under `runs` has a first dimension of one entry per repeat:

        embed.embedding [V, D]                            runs.r.p.attention_norm.scale [D]
        runs.r.p.attention.{query,key,value,output}.kernel [in, out] (.bias [out])
        runs.r.p.attention.{query_norm,key_norm}.scale [C]   with qk_norm
        runs.r.p.{post_attention_norm,post_mlp_norm}.scale [D]   with post_norms
        runs.r.p.mlp_norm.scale [D]                       runs.r.p.mlp.{gate,up,down}.kernel (.bias)
        final_norm.scale [D]                              lm_head.kernel [D, V] unless the head is tied
    """

    def __init__(self, spec: DecoderSpec, options: Options, key: jax.Array, param_dtype="float32"):
        """Draws new parameters; under `jax.eval_shape` it makes the abstract decoder that loading fills.

        Kernels and embeddings are normal with standard deviation `spec.initializer_range`, cut off at three of them;
        biases are 0 and norms the identity.
        """
        check_kernel(options.attention)
        if options.remat not in REMAT_POLICIES:
            known = did_you_mean(options.remat, REMAT_POLICIES)
            raise UserError(f"model.remat: unknown policy '{options.remat}'; {known}.")
        self.spec = spec
        self.options = options
        runs = plan_runs(spec.layers)
        embed_key, head_key, *run_keys = jax.random.split(key, 2 + len(runs))
        self.embed = Embed(spec, embed_key, param_dtype, options)
        self.runs = nnx.List([])
        new_stack = jax.vmap(lambda block_key: Block(spec, block_key, param_dtype, options))
        for run, run_key in zip(runs, run_keys, strict=True):
            places = jax.random.split(run_key, (len(run.period), run.repeats))
            self.runs.append(nnx.List([_name_stacked_axis(new_stack(keys)) for keys in places]))
        self.final_norm = Norm(spec.hidden_size, spec, param_dtype)
        if not spec.tied_head:
            shape = (spec.hidden_size, spec.vocab_size)
            self.lm_head = Linear(
                shape, ("embed", "vocab"), False, head_key, spec.initializer_range, param_dtype, options
            )

    @property
    def logit_soft_cap(self) -> float | None:
        return self.spec.logit_soft_cap

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the states after the final norm, [B, L, D] in the compute dtype.

        tokens, positions and segments are int32 [B, L]. Without segments every row is one document; without positions
        they restart at 0 with every segment; those given may be any, in any order. Segment 0 is padding: its states are
        finite and mean nothing. `key` is the randomness of a training call; without it nothing is random.
        """
        segments = jnp.ones_like(tokens) if segments is None else segments
        positions = segment_positions(segments) if positions is None else positions
        x = self.embed(tokens)
        if self.options.neftune and key is not None:  # in units of the table, which some families scale
            x = with_neftune(x, segments, jax.random.fold_in(key, 0), self.options.neftune * self.embed.scale)
        x = self.options.constrain(x, ("batch", "length", "act_embed"))
        tables = self.rope_tables(positions)
        masks = {
            layer: self.mask(layer, positions, segments, positions, segments, aligned=True)
            for layer in dict.fromkeys(self.spec.layers)
        }
        for run, blocks in zip(plan_runs(self.spec.layers), self.runs, strict=True):

            def period(x, blocks, run=run):
                for layer, block in zip(run.period, blocks, strict=True):
                    x = block(x, tables[layer.rope], masks[layer])
                return x, None

            policy = REMAT_POLICIES[self.options.remat]
            if policy is not None:
                period = jax.checkpoint(period, policy=policy, prevent_cse=False)
            x, _ = jax.lax.scan(period, x, tuple(blocks))
        return self.final_norm(x)

    def head_kernel(self) -> jax.Array:
        """Returns the kernel [D, V] of the head in the compute dtype, tied or not."""
        if self.spec.tied_head:
            return self.embed.embedding[...].astype(self.options.dtype).T
        return self.lm_head.materialise()

    def head(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., V] of hidden states [..., D], soft cap applied."""
        logits = jnp.dot(
            hidden.astype(self.options.dtype), self.head_kernel(),
            precision=self.options.dot_precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return cap(logits, self.logit_soft_cap)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """Returns float32 logits [B, L, V]; see `hidden` for the arguments."""
        logits = self.head(self.hidden(tokens, positions, segments))
        return self.options.constrain(logits, ("batch", "length", "act_vocab"))

    def init_cache(self, batch: int, max_length: int, dtype=None) -> Cache:
        """Returns an empty cache for `batch` sequences of at most `max_length` tokens, by default in compute dtype."""
        return new_cache(self.spec, batch, max_length, dtype or self.options.dtype)

    def extend(
        self, tokens: jax.Array, positions: jax.Array, segments: jax.Array | None, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Reads L more tokens of every sequence: a prompt, a further turn, or the one token decoded last.

        tokens, positions and segments are int32 [B, L]. A row of the cache is one sequence, so segments only tell
        tokens (above 0) from padding (0), which may stand anywhere and is not kept; None: no padding. Positions count
        the tokens of each sequence from 0, so rows may differ in length. Returns the hidden states after the final
        norm [B, L, D], equal to those of `hidden` on the whole sequence, and the cache with the tokens in it. A token
        at a position of `cache.max_length` or above cannot be kept: its states are NaN.
        """
        return extend(self, tokens, positions, segments, cache)

    def rope_tables(self, positions: jax.Array) -> dict:
        """Returns the rope table at `positions` [B, L] for every kind of rope in the model."""
        kinds = dict.fromkeys(layer.rope for layer in self.spec.layers)
        return {rope: rope_table(rope, self.spec.head_size, positions) for rope in kinds}

    def mask(self, layer: LayerSpec, positions, segments, key_positions, key_segments, aligned: bool) -> MaskSpec:
        """Returns the mask of a kind of layer for queries and keys at these positions and segments."""
        return MaskSpec(
            query_positions=positions, key_positions=key_positions,
            query_segments=segments, key_segments=key_segments,
            causal=True, window=layer.window, scale=self.spec.attention_scale,
            soft_cap=self.spec.attention_soft_cap, aligned=aligned,
        )  # fmt: skip


def _name_stacked_axis(blocks: Block) -> Block:
    """Puts "layers" before the logical axes of parameters that vmap has stacked."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda v: v.replace(axes=("layers", *v.axes)), blocks, is_leaf=is_variable)
