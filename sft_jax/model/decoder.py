"""The decoder of every family: embedding, scanned runs of blocks, final norm, head."""

import functools
import operator
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.attention import check_kernel
from sft_jax.model.block import Block
from sft_jax.model.cache import Cache, new_cache
from sft_jax.model.context import from_zigzag, to_zigzag
from sft_jax.model.decoding import extend
from sft_jax.model.experts import Routed
from sft_jax.model.layers import Embed, Linear, Norm, resized
from sft_jax.model.low_rank import split_key
from sft_jax.model.mask import MaskSpec, cap, segment_positions
from sft_jax.model.neftune import with_neftune
from sft_jax.model.options import Options, unrounded
from sft_jax.model.product import product
from sft_jax.model.rope import RopeTable, depends_on_length, document_lengths, rope_table
from sft_jax.model.runs import plan_runs
from sft_jax.model.spec import DecoderSpec, LayerSpec, RopeSpec
from sft_jax.model.token_rows import TokenRows

_INPUT = "period_input"  # the states that a period of blocks reads
# What the backward pass keeps of a period of blocks; the rest is computed again. None: everything is kept.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,  # but for what the period reads
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # as "full", kept in the memory of the host
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], offload_src="device", offload_dst="pinned_host"
    ),
}


class Decoder(nnx.Module):
    """A decoder-only transformer. Never changes after construction; a pytree of its parameters.

    Parameters by path, where r and p are the run and the place in its period (sft_jax.model.runs), and everything
    under `runs` has a first dimension of one entry per repeat; V is `spec.vocab_rows`:

        embed.embedding [V, D]                            embed.positions [n, D] where they are learned
        runs.r.p.{attention_norm,mlp_norm}.scale [D] (.bias)   with pre_norms; a parallel block has the first alone
        runs.r.p.{post_attention_norm,post_mlp_norm}.scale [D]   with post_norms
        runs.r.p.attention.{query,key,value,output}.kernel [in, out] (.bias [out])
        runs.r.p.attention.{query_norm,key_norm}.scale [C] or [H * C]   with query_key_norm
        runs.r.p.attention.sinks [H]                      with sinks
        runs.r.p.attention.{query_down,query_up,latent_down,latent_up}.kernel,
            .{query_norm,latent_norm}.scale               of latent attention, in place of key and value
        runs.r.p.mlp.{gate,up,down}.kernel (.bias)        a plain MLP has no gate
        runs.r.p.mlp.router.kernel [D, E] (.bias), .correction [E], .{gate,up,down}.kernel [E, in, out] (.bias [E, out]),
            .shared.{gate,up,down}.kernel, .shared_gate.kernel [D, 1]   of a layer of experts
        final_norm.scale [D] (.bias)                      lm_head.kernel [D, V] unless the head is tied

    With adapters (sft_jax.model.adapters), beside the kernel [in, out] of a projection or the embedding [V, D]:

        PROJECTION.adapter.a [in, r], .b [r, out]         .start_a, .start_b of PiSSA, .magnitude [out] of DoRA
        embed.token_rows.rows, head_rows.rows [n, D]      of chosen tokens; the second unless the head is tied

    With quantised blocks (sft_jax.model.quantise), in place of a kernel [in, out]:

        PROJECTION.kernel.codes [in or in / 2, out], .scales [blocks, out]
    """

    head_rows: TokenRows | None

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
        for run, run_key in zip(runs, run_keys, strict=True):
            places = jax.random.split(run_key, (len(run.period), run.repeats))
            self.runs.append(nnx.List([]))
            for layer, keys in zip(run.period, places, strict=True):
                stack = jax.vmap(lambda key, layer=layer: Block(spec, layer, key, param_dtype, options))(keys)
                self.runs[-1].append(_name_stacked_axis(stack))
        self.final_norm = Norm(spec.hidden_size, spec.norm, param_dtype)
        if not spec.tied_head:
            shape = (spec.hidden_size, spec.vocab_size)
            self.lm_head = Linear(
                shape, ("embed", "vocab"), False, head_key, spec.initializer_range, param_dtype, unrounded(options)
            )
            self.lm_head.kernel.set_value(resized(self.lm_head.kernel[...], 1, spec.vocab_rows))
        self.head_rows = nnx.data(None)
        self.adapters = None  # the AdapterPlan of sft_jax.model.adapters, where there are adapters

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
        return self._hidden(tokens, positions, segments, key, route=False)[0]

    def hidden_and_routed(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routed | None]:
        """As `hidden`, with how the tokens were routed: the mean over layers of experts, `load` by layer [layers, E].

        None for a model without experts. Segments must count from 1 to at most the length.
        """
        return self._hidden(tokens, positions, segments, key, route=True)

    def _hidden(self, tokens, positions, segments, key, route: bool) -> tuple[jax.Array, Routed | None]:
        segments = jnp.ones_like(tokens) if segments is None else segments
        positions = segment_positions(segments) if positions is None else positions
        x = self.embed(tokens, positions)
        if self.options.neftune and key is not None:  # in units of the table, which some families scale
            x = with_neftune(x, segments, jax.random.fold_in(key, 0), self.options.neftune * self.embed.scale)
        x = self.options.constrain(x, ("batch", "length", "act_embed"))
        mesh = self.options.mesh
        x, positions, segments = (to_zigzag(part, mesh) for part in (x, positions, segments))
        lengthy = any(depends_on_length(layer.rope) for layer in self.spec.layers)
        tables = self.rope_tables(positions, document_lengths(positions, segments) if lengthy else None)
        masks = {
            layer: self.mask(layer, positions, segments, positions, segments, aligned=True)
            for layer in dict.fromkeys(self.spec.layers)
        }
        routed = []
        run_keys = split_key(None if key is None else jax.random.fold_in(key, 1), len(self.runs))
        for run, blocks, run_key in zip(plan_runs(self.spec.layers), self.runs, run_keys, strict=True):

            def period(x, inputs, run=run):
                blocks, key = inputs
                x = checkpoint_name(x, _INPUT)
                found = []
                for layer, block, key in zip(run.period, blocks, split_key(key, len(blocks)), strict=True):
                    x, of_layer = block(x, tables[layer.rope], masks[layer], segments if route else None, key)
                    found.append(of_layer)
                return x, tuple(found)

            policy = REMAT_POLICIES[self.options.remat]
            if policy is not None:
                period = jax.checkpoint(period, policy=policy, prevent_cse=False)
            keys = None if run_key is None else jax.random.split(run_key, run.repeats)
            x, found = jax.lax.scan(period, x, (tuple(blocks), keys))
            routed += [of_place for of_place in found if of_place is not None]
        routed = _over_layers(routed)
        if routed is not None:
            routed = routed._replace(balance=from_zigzag(routed.balance, mesh), z=from_zigzag(routed.z, mesh))
        return from_zigzag(self.final_norm(x), mesh), routed

    def head_products(
        self, hidden: jax.Array, key: jax.Array | None = None
    ) -> tuple[list[tuple[jax.Array, jax.Array]], int]:
        """Returns (states [..., n], kernel) pairs whose products add up to the logits before the cap, and an axis.

        The axis is that of the vocabulary in every kernel: [n, V] (1), or [V, n] (0) of a tied head, as it is stored; V is
        `spec.vocab_rows`. The first pair is the head itself, the others are what adapters add; `key` is that of `hidden`, the
        states [..., D] after the final norm.
        """
        hidden, vocab_axis = self.head_input(hidden), 0 if self.spec.tied_head else 1
        dot = partial(product, precision=self.options.dot_precision, constrain=self.options.constrain)
        if self.spec.tied_head:
            rows, adapter = self.embed.token_rows, self.embed.adapter
            table = self.embed.embedding[...]
            products = [(hidden, table)]
            if adapter is not None:
                states = dot(hidden, adapter.b[...].T, adapter.b.axes[::-1])
                products.append((states * adapter.scale, adapter.a[...]))
        else:
            rows, adapter = self.head_rows, self.lm_head.adapter
            kernel = self.lm_head.operand()
            table = self.lm_head.kernel[...].T
            head_key = None if key is None else jax.random.fold_in(key, 2)
            products = [(hidden, kernel)] if adapter is None else adapter.products(hidden, kernel, head_key, dot)
        if rows is not None:
            products.append(rows.head_product(hidden, table[jnp.asarray(rows.ids)], vocab_axis, dot))
        return products, vocab_axis

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Returns hidden states [..., D] as the head reads them: the scale of the logits is put on this, smaller, side."""
        if self.spec.logit_scale != 1.0:
            hidden = hidden.astype(jnp.float32) * self.spec.logit_scale
        return hidden.astype(self.options.dtype)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., V] of hidden states [..., D], scaled and capped; V is `spec.vocab_size`."""
        products, vocab_axis = self.head_products(hidden)

        def in_float32(states, kernel):
            kernel = kernel.astype(states.dtype)
            kernel = kernel.T if vocab_axis == 0 else kernel
            return jnp.dot(states, kernel, precision=self.options.dot_precision, preferred_element_type=jnp.float32)

        first, *added = (in_float32(*pair) for pair in products)
        logits = first + functools.reduce(operator.add, added) if added else first
        return cap(logits[..., : self.spec.vocab_size], self.logit_soft_cap)

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

    def rope_tables(
        self, positions: jax.Array, lengths: jax.Array | None = None
    ) -> dict[RopeSpec | None, RopeTable | None]:
        """Returns the rope table at `positions` [B, L] for every kind of rope in the model, None for no rope.

        `lengths`: see `sft_jax.model.rope.rope_table`.
        """
        kinds = dict.fromkeys(layer.rope for layer in self.spec.layers)
        return {rope: None if rope is None else rope_table(rope, positions, lengths) for rope in kinds}

    def mask(self, layer: LayerSpec, positions, segments, key_positions, key_segments, aligned: bool) -> MaskSpec:
        """Returns the mask of a kind of layer for queries and keys at these places; `aligned`: they are the same tokens."""
        return MaskSpec(
            query_positions=positions, key_positions=key_positions,
            query_segments=segments, key_segments=key_segments,
            causal=True, window=layer.window, scale=self.spec.attention_scale,
            soft_cap=self.spec.attention_soft_cap, parts=int(aligned),
        )  # fmt: skip


def _over_layers(routed: list[Routed]) -> Routed | None:
    """Returns the mean over stacks [repeats, ...] of layers of experts; the load of every layer."""
    if not routed:
        return None
    balance, z, load = (jnp.concatenate(parts) for parts in zip(*routed, strict=True))
    return Routed(balance.mean(axis=0), z.mean(axis=0), load)


def _name_stacked_axis(blocks: Block) -> Block:
    """Puts "layers" before the logical axes of parameters that vmap has stacked."""
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda v: v.replace(axes=("layers", *v.axes)), blocks, is_leaf=is_variable)
