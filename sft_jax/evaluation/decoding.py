"""Decoding on the device: a batch of prompts is read in chunks, then grows by one token at a time.

Shapes depend on the number of rows and on the room for a sequence only, and both are rounded up (`round_up`), so few
programs are compiled however prompts vary. Lengths, stop ids, limits, seed and temperature are data.

Letters: B rows, T room for a sequence (prompt and answer), K stop ids, V vocabulary.
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

MAX_CHUNK = 256  # tokens of a prompt read at once: bounds the memory of attention over a long prompt


class DecodeState(NamedTuple):
    """A batch of sequences that grow. Row b holds the tokens [0, lengths[b]); what stands behind means nothing."""

    cache: Cache  # holds every token but the last one chosen
    tokens: Array  # int32 [B, T]
    lengths: Array  # int32 [B], tokens so far, the stop token not included
    done: Array  # bool [B], grows no more
    stopped: Array  # bool [B], done because a stop id was chosen
    count: Array  # int32 [], tokens chosen so far in every row that is not done
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


@functools.partial(jax.jit, static_argnames="chunk")
def start(
    decoder: Decoder,
    tokens: Array,
    lengths: Array,
    rows: Array,
    seed: Array,
    stop_ids: Array,
    sampling: Sampling,
    chunk: int,
) -> DecodeState:
    """Reads the prompts and chooses the first token of every answer.

    Args:
        tokens: int32 [B, T], prompts at the left; `chunk` divides T.
        lengths: int32 [B], tokens of each prompt, below T; 0 marks a row that only fills the batch.
        rows: int32 [B], a number for each prompt. Its random bits depend on this and `seed`, not on the batch.
        seed: uint32 [].
        stop_ids: int32 [K], -1 where there are fewer.
    """
    batch, room = tokens.shape
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
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
    false = jnp.zeros(batch, bool)
    state = DecodeState(cache, tokens, lengths, lengths == 0, false, jnp.int32(0), keys)
    return _append(state, decoder.head(last), stop_ids, sampling)


@functools.partial(jax.jit, donate_argnames="state")
def advance(
    decoder: Decoder, state: DecodeState, stop_ids: Array, sampling: Sampling, limit: Array, steps: Array
) -> DecodeState:
    """Adds up to `steps` tokens to every sequence, until all are done or hold `limit` chosen tokens.

    `limit` and `steps` are int32 []. The state that goes in is overwritten. Steps of any size give the same tokens.
    """
    end = jnp.minimum(limit, state.count + steps)

    def grow(state: DecodeState) -> DecodeState:
        newest = jnp.where(state.done, 0, state.lengths - 1)[:, None]
        token = jnp.take_along_axis(state.tokens, newest, axis=1)
        alive = (~state.done).astype(jnp.int32)[:, None]
        hidden, cache = decoder.extend(token, newest, alive, state.cache)
        return _append(state._replace(cache=cache), decoder.head(hidden[:, 0]), stop_ids, sampling)

    return jax.lax.while_loop(lambda state: (state.count < end) & ~jnp.all(state.done), grow, state)


def replicated(decoder: Decoder, arrays):
    """Returns `arrays` whole on every device of the decoder's mesh, so that every process can read them."""
    sharding = decoder.embed.embedding[...].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return arrays
    return _replicate(arrays, NamedSharding(sharding.mesh, P()))


@functools.partial(jax.jit, static_argnames="sharding")
def _replicate(arrays, sharding: NamedSharding):
    return jax.lax.with_sharding_constraint(arrays, sharding)


def _append(state: DecodeState, logits: Array, stop_ids: Array, sampling: Sampling) -> DecodeState:
    """Chooses a token from `logits` [B, V] for every row that is not done."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    token = choose(logits, keys, sampling)
    stops = ~state.done & jnp.any(token[:, None] == stop_ids, axis=1)
    done = state.done | stops
    room = state.tokens.shape[1]
    place = jnp.where(done, room, state.lengths)  # outside for a row that is done: dropped
    tokens = state.tokens.at[jnp.arange(len(token)), place].set(token, mode="drop")
    lengths = jnp.where(done, state.lengths, state.lengths + 1)
    return DecodeState(
        state.cache, tokens, lengths, done, state.stopped | stops, state.count + 1, state.keys
    )


def _lay_out(decoder: Decoder, cache: Cache) -> Cache:
    """Puts the cache where the keys and values are computed: rows over data and fsdp, kv heads over tensor."""
    constrain = decoder.options.constrain
    put = lambda x: constrain(x, (None, "batch", None, "act_kv_heads", None))  # noqa: E731
    return Cache(
        jax.tree.map(put, cache.keys), jax.tree.map(put, cache.values), cache.positions, cache.max_length
    )
