"""Reading further tokens with a KV cache: the body of `Decoder.extend`."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sft_jax.model.cache import Cache, slots, slots_of, store
from sft_jax.model.runs import plan_runs

if TYPE_CHECKING:
    from sft_jax.model.decoder import Decoder


def extend(
    decoder: "Decoder", tokens: jax.Array, positions: jax.Array, segments: jax.Array | None, cache: Cache
) -> tuple[jax.Array, Cache]:
    """See `Decoder.extend`.

    One token goes into its slot first, which pushes out only what its window hides, and then reads the slots. Several
    tokens read the slots as they were and each other, since the first of them may still see what the last pushes out.
    """
    spec, options = decoder.spec, decoder.options
    segments = jnp.ones_like(tokens) if segments is None else (segments > 0).astype(jnp.int32)
    single = tokens.shape[1] == 1
    slot = {size: slots_of(positions, segments, size) for size in cache.positions}
    new_positions = {size: store(old, positions, slot[size]) for size, old in cache.positions.items()}
    # A model whose angles depend on the length takes those of the longest sequence that the cache holds, since keys that
    # are in it keep theirs.
    tables = decoder.rope_tables(positions, jnp.full_like(positions, cache.max_length))
    masks = {
        layer: decoder.mask(
            layer, positions, segments,
            *_visible_keys(single, new_positions, cache.positions, slots(layer, cache.max_length), positions, segments),
            aligned=False,
        )
        for layer in dict.fromkeys(spec.layers)
    }  # fmt: skip

    def through(block, layer, index, x, keys, values):
        """Takes x through one block; keys and values are the stacks of its place, of which `index` is its own."""
        normed = block.enter(x)
        q, k, v = block.attention.project(normed, tables[layer.rope])
        place = slot[keys.shape[2]]
        if not single:
            k_seen = jnp.concatenate([keys[index], k.astype(keys.dtype)], axis=1)
            v_seen = jnp.concatenate([values[index], v.astype(values.dtype)], axis=1)
        keys, values = store(keys, k, place, index), store(values, v, place, index)
        if single:
            k_seen, v_seen = keys[index], values[index]
        mixed = block.attention.mix(q, k_seen.astype(q.dtype), v_seen.astype(q.dtype), masks[layer])
        return block.finish(x, normed, mixed)[0], keys, values

    too_far = (positions >= cache.max_length) & (segments > 0)
    x = jnp.where(too_far[..., None], jnp.nan, decoder.embed(tokens, positions))
    x = options.constrain(x, ("batch", "length", "act_embed"))
    all_keys, all_values = [], []
    for number, (run, blocks) in enumerate(zip(plan_runs(spec.layers), decoder.runs, strict=True)):
        # The cache is carried, not scanned over: scanned outputs would be written anew for every token.
        def period(carry, inputs, run=run):
            x, keys, values = carry[0], list(carry[1]), list(carry[2])
            index, blocks = inputs
            for p, (layer, block) in enumerate(zip(run.period, blocks, strict=True)):
                x, keys[p], values[p] = through(block, layer, index, x, keys[p], values[p])
            return (x, tuple(keys), tuple(values)), None

        carry = (x, cache.keys[number], cache.values[number])
        (x, keys, values), _ = jax.lax.scan(period, carry, (jnp.arange(run.repeats), tuple(blocks)))
        all_keys.append(keys)
        all_values.append(values)
    return decoder.final_norm(x), Cache(tuple(all_keys), tuple(all_values), new_positions, cache.max_length)


def _visible_keys(single: bool, new: dict, old: dict, size: int, positions, segments) -> tuple[jax.Array, jax.Array]:
    """Returns positions and segments of the keys that a layer of `size` slots reads: [B, S] or [B, S + L]."""
    if single:
        return new[size], (new[size] >= 0).astype(jnp.int32)
    key_segments = jnp.concatenate([(old[size] >= 0).astype(jnp.int32), segments], axis=1)
    return jnp.concatenate([old[size], positions], axis=1), key_segments
