"""The KV cache of decoding: global layers keep every token, local layers a ring of their window."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sft_jax.model.runs import plan_runs
from sft_jax.model.spec import DecoderSpec, LayerSpec

EMPTY = -1  # position of a slot that holds no token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, one sequence a row, stacked as the layers are.

    A layer with S slots keeps the token at position p in slot p % S. Layers with as many slots share `positions`.
    """

    keys: tuple[tuple[jax.Array, ...], ...]  # by run and place: [repeats, B, S, K, C], after rope
    values: tuple[tuple[jax.Array, ...], ...]  # [repeats, B, S, K, Cv]
    positions: dict[int, jax.Array]  # S -> int32 [B, S], EMPTY where nothing is kept
    max_length: int = dataclasses.field(metadata={"static": True})  # positions must stay below


def slots(layer: LayerSpec, max_length: int) -> int:
    """Returns how many tokens a layer keeps."""
    return max_length if layer.window is None else min(layer.window, max_length)


def new_cache(spec: DecoderSpec, batch: int, max_length: int, dtype) -> Cache:
    """Returns an empty cache for `batch` sequences of at most `max_length` tokens."""

    def stacks(size: int):
        return tuple(
            tuple(
                jnp.zeros((run.repeats, batch, slots(layer, max_length), spec.kv_heads, size), dtype)
                for layer in run.period
            )
            for run in plan_runs(spec.layers)
        )

    sizes = {slots(layer, max_length) for layer in spec.layers}
    positions = {size: jnp.full((batch, size), EMPTY, jnp.int32) for size in sizes}
    return Cache(stacks(spec.head_size), stacks(spec.value_size), positions, max_length)


def slots_of(positions: jax.Array, segments: jax.Array, size: int) -> jax.Array:
    """Returns the slots [B, L] into which tokens go, of `size` slots; `size` itself where a token is not kept.

    Padding is not kept, nor is a token that a later one of the same call would push out of the ring.
    """
    last = jnp.where(segments > 0, positions, EMPTY).max(axis=1, keepdims=True)
    kept = (segments > 0) & (positions > last - size)
    return jnp.where(kept, positions % size, size)


def store(kept: jax.Array, new: jax.Array, slot: jax.Array, *layer: jax.Array) -> jax.Array:
    """Returns `kept` [B, S, ...] with `new` [B, L, ...] in the slots [B, L]; `layer` indexes a dimension before B."""
    rows = jnp.arange(slot.shape[0])[:, None]
    return kept.at[(*layer, rows, slot)].set(new.astype(kept.dtype), mode="drop")
