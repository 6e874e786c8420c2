"""Decoding on the device: slots for sequences that are filled with prompts, grow by a token at a time, and are filled anew.

Shapes depend on the number of slots, on the room for a sequence, on the number of prompts that are read at once and on the
length of the pieces in which they are read. All are of few sizes, so few programs are compiled however prompts vary.
Lengths, places, stop ids, limits, seed and temperature are data.

Letters: B slots, T room for a sequence (prompt and answer), R prompts read at once, K stop ids, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.evaluation.sampling import Sampling, choose
from sft_jax.model.cache import Cache
from sft_jax.model.decoder import Decoder

CHUNKS = (16, 64, 256)  # tokens of a prompt read at once; the last bounds the memory of attention over a long prompt


class DecodeState(NamedTuple):
    """Sequences that grow. Slot b holds the tokens [0, lengths[b]); what stands behind means nothing."""

    cache: Cache  # holds every token but the last one chosen
    tokens: Array  # int32 [B, T]
    lengths: Array  # int32 [B], tokens so far, the stop token not included
    counts: Array  # int32 [B], tokens chosen so far, the stop token included
    done: Array  # bool [B], grows no more, or was never filled
    stopped: Array  # bool [B], done because a stop id was chosen
    seen: Array  # bool [B, V], tokens of the sequence, where repeated ones are penalised; else [B, 0]
    keys: Array  # random keys [B]


def round_up(size: int) -> int:
    """Returns the least of 8, 12, 16, 24, 32, 48, ... (powers of two and their midpoints) that is at least `size`.

    >>> [round_up(n) for n in (1, 9, 13, 100, 129, 193)]
    [8, 12, 16, 128, 192, 256]
    """
    power = 8
    while power < size:
        power *= 2
    return power * 3 // 4 if power > 8 and size <= power * 3 // 4 else power


def chunk_for(longest: int) -> int:
    """Returns the length of the pieces in which prompts of at most `longest` tokens are read."""
    return next((chunk for chunk in CHUNKS if chunk >= longest), CHUNKS[-1])


@functools.partial(jax.jit, static_argnames=("slots", "room", "penalised"))
def empty(decoder: Decoder, slots: int, room: int, penalised: bool) -> DecodeState:
    """Returns a state in which nothing is decoded yet."""
    zeros = jnp.zeros(slots, jnp.int32)
    return DecodeState(
        _lay_out(decoder, decoder.init_cache(slots, room)),
        jnp.zeros((slots, room), jnp.int32),
        zeros,
        zeros,
        jnp.ones(slots, bool),
        jnp.zeros(slots, bool),
        jnp.zeros((slots, decoder.spec.vocab_size if penalised else 0), bool),
        jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32)),
    )


@functools.partial(jax.jit, static_argnames="chunk", donate_argnames="state")
def fill(
    decoder: Decoder,
    state: DecodeState,
    tokens: Array,
    lengths: Array,
    places: Array,
    numbers: Array,
    seed: Array,
    stop_ids: Array,
    sampling: Sampling,
    limit: Array,
    chunk: int,
) -> DecodeState:
    """Reads prompts into slots, in place of what was there, and chooses the first token of their answers.

    The prompts are read into a cache of their own, whose rows then go into those of their slots; the other slots are as
    they were. The state that goes in is overwritten.

    Args:
        tokens: int32 [R, T rounded up to a multiple of `chunk`], prompts at the left.
        lengths: int32 [R], tokens of each prompt, below T; 0 for a row that only fills the shape.
        places: int32 [R], the slot of each prompt, all different; B for a row that only fills the shape.
        numbers: uint32 [R]. The random bits of an answer depend on this and `seed`, not on slots or other prompts.
        seed: uint32 [].
        stop_ids: int32 [K], -1 where there are fewer.
        limit: int32 [], tokens of an answer, at most.
    """
    batch, room = tokens.shape[0], state.tokens.shape[1]
    offsets = jnp.arange(chunk, dtype=jnp.int32)

    def read(carry):
        at, cache, last = carry
        positions = jnp.broadcast_to(at + offsets, (batch, chunk))
        part = jax.lax.dynamic_slice(tokens, (0, at), (batch, chunk))
        real = positions < lengths[:, None]
        hidden, cache = decoder.extend(jnp.where(real, part, 0), positions, real.astype(jnp.int32), cache)
        index = lengths - 1 - at  # of the last token of the prompt, if it is in this chunk
        here = jnp.take_along_axis(hidden, jnp.clip(index, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return at + chunk, cache, jnp.where(((index >= 0) & (index < chunk))[:, None], here, last)

    cache = _lay_out(decoder, decoder.init_cache(batch, room))
    last = jnp.zeros((batch, decoder.spec.hidden_size), decoder.options.dtype)
    longest = jnp.max(lengths)
    _, cache, last = jax.lax.while_loop(lambda carry: carry[0] < longest, read, (jnp.int32(0), cache, last))
    none = jnp.zeros(batch, jnp.int32)
    rows = jnp.arange(batch)[:, None]
    vocabulary = state.seen.shape[1]
    in_prompt = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, vocabulary)
    new = DecodeState(
        cache,
        tokens[:, :room],
        lengths,
        none,
        lengths == 0,
        jnp.zeros(batch, bool),
        jnp.zeros((batch, vocabulary), bool).at[rows, in_prompt].set(True, mode="drop"),
        jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers),
    )
    return _into(decoder, state, _append(new, decoder.head(last), stop_ids, sampling, limit), places)


@functools.partial(jax.jit, donate_argnames="state")
def advance(
    decoder: Decoder,
    state: DecodeState,
    stop_ids: Array,
    sampling: Sampling,
    limit: Array,
    steps: Array,
    wanted: Array,
) -> DecodeState:
    """Adds up to `steps` tokens to every sequence, and ends once `wanted` slots are done or all are.

    `limit` (tokens of an answer), `steps` and `wanted` are int32 []. The state that goes in is overwritten. Steps of any
    size give the same tokens.
    """

    def grow(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        made, state = carry
        newest = jnp.where(state.done, 0, state.lengths - 1)[:, None]
        token = jnp.take_along_axis(state.tokens, newest, axis=1)
        alive = (~state.done).astype(jnp.int32)[:, None]
        hidden, cache = decoder.extend(token, newest, alive, state.cache)
        return made + 1, _append(state._replace(cache=cache), decoder.head(hidden[:, 0]), stop_ids, sampling, limit)

    def goes_on(carry: tuple[Array, DecodeState]) -> Array:
        made, state = carry
        return (made < steps) & (jnp.sum(state.done) < wanted) & ~jnp.all(state.done)

    return jax.lax.while_loop(goes_on, grow, (jnp.int32(0), state))[1]


@functools.partial(jax.jit, donate_argnames="state")
def end(state: DecodeState, ended: Array) -> DecodeState:
    """Ends the sequences in the slots where `ended` [B] says so, as if they had been stopped."""
    return state._replace(done=state.done | ended, stopped=state.stopped | (ended & ~state.done))


def replicated(decoder: Decoder, arrays):
    """Returns `arrays` whole on every device of the decoder's mesh, so that every process can read them."""
    sharding = decoder.embed.embedding[...].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return arrays
    return _replicate(arrays, NamedSharding(sharding.mesh, P()))


@functools.partial(jax.jit, static_argnames="sharding")
def _replicate(arrays, sharding: NamedSharding):
    return jax.lax.with_sharding_constraint(arrays, sharding)


def _append(state: DecodeState, logits: Array, stop_ids: Array, sampling: Sampling, limit: Array) -> DecodeState:
    """Chooses a token from `logits` [B, V] for every slot that is not done."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.counts)
    token = choose(logits, keys, sampling, state.seen)
    stops = ~state.done & jnp.any(token[:, None] == stop_ids, axis=1)
    slots, room = state.tokens.shape
    counts = jnp.where(state.done, state.counts, state.counts + 1)
    grows = ~(state.done | stops)
    at = jnp.where(grows, state.lengths, room)  # outside for a slot that does not grow: dropped
    tokens = state.tokens.at[jnp.arange(slots), at].set(token, mode="drop")
    new = jnp.where(grows, token, state.seen.shape[1])
    return DecodeState(
        state.cache,
        tokens,
        jnp.where(grows, state.lengths + 1, state.lengths),
        counts,
        state.done | stops | (counts >= limit),
        state.stopped | stops,
        state.seen.at[jnp.arange(slots), new].set(True, mode="drop"),
        state.keys,
    )


def _into(decoder: Decoder, state: DecodeState, new: DecodeState, places: Array) -> DecodeState:
    """Returns `state` with the rows of `new` in the slots `places`; a row whose place is outside goes nowhere."""
    put = lambda old, rows: old.at[places].set(rows, mode="drop")  # noqa: E731
    stacked = lambda old, rows: old.at[:, places].set(rows, mode="drop")  # noqa: E731
    cache = _lay_out(
        decoder,
        Cache(
            jax.tree.map(stacked, state.cache.keys, new.cache.keys),
            jax.tree.map(stacked, state.cache.values, new.cache.values),
            jax.tree.map(put, state.cache.positions, new.cache.positions),
            state.cache.max_length,
        ),
    )
    return DecodeState(cache, *(put(old, rows) for old, rows in zip(state[1:], new[1:], strict=True)))


def _lay_out(decoder: Decoder, cache: Cache) -> Cache:
    """Puts the cache where the keys and values are computed: rows over data and fsdp, kv heads over tensor."""
    constrain = decoder.options.constrain
    put = lambda x: constrain(x, (None, "batch", None, "act_kv_heads", None))  # noqa: E731
    return Cache(
        jax.tree.map(put, cache.keys), jax.tree.map(put, cache.values), cache.positions, cache.max_length
    )
