"""From logits to the next token: greedy, or a draw from the distribution that the options leave."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from sft_jax.config_checks import check_sampling


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "min_p", "repetition_penalty"],
    meta_fields=["top_k", "greedy", "nucleus", "penalised"],
)
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; made by `sampling`.

    A pytree: another temperature, top_p, min_p or penalty does not compile again, the static fields do.
    """

    temperature: float | Array
    top_p: float | Array
    min_p: float | Array
    repetition_penalty: float | Array
    top_k: int  # 0 = all tokens
    greedy: bool
    nucleus: bool  # whether top_p rules anything out
    penalised: bool  # whether tokens that the sequence has already count less


def sampling(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Sampling:
    """Returns checked sampling options.

    They apply in the order penalty, temperature, top-k, top-p, min-p, as in transformers.

    Args:
        temperature: 0 is greedy.
        top_k: Keep the k most probable tokens; 0 keeps all (Fan et al. 2018, arXiv:1805.04833).
        top_p: Keep the fewest tokens whose probabilities reach p; 1 keeps all (Holtzman et al. 2019, arXiv:1904.09751).
        min_p: Keep the tokens at least min_p times as probable as the most probable one; 0 keeps all (Nguyen et al. 2024,
            arXiv:2407.01082).
        repetition_penalty: Of tokens that the prompt or the answer has already, positive logits are divided by it and
            negative ones multiplied, in greedy decoding too; 1 changes none (Keskar et al. 2019, arXiv:1909.05858).

    Raises:
        UserError: A value is out of range.
    """
    check_sampling("", temperature, top_k, top_p, min_p, repetition_penalty)
    return Sampling(
        float(temperature), float(top_p), float(min_p), float(repetition_penalty), int(top_k), greedy=temperature == 0,
        nucleus=top_p < 1, penalised=repetition_penalty != 1,
    )  # fmt: skip


def penalise(logits: Array, seen: Array, options: Sampling) -> Array:
    """Returns logits [..., V] in which the tokens that are `seen`, bool [..., V], count less."""
    penalty = options.repetition_penalty
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Array, options: Sampling) -> Array:
    """Returns the log-weights that `options` leave: divided by the temperature, -inf where a token is ruled out.

    Args:
        logits: float32 [..., V].
        options: Not greedy.

    Returns:
        float32 [..., V]. The most probable token always stays. Of equal logits at the edge of top-k or top-p the one
        with the smaller id stays.
    """
    scaled = logits / options.temperature
    floor = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(options.min_p)  # -inf, which nothing is below, for 0
    vocabulary = logits.shape[-1]
    keep = min(options.top_k, vocabulary) or vocabulary
    if keep == vocabulary and not options.nucleus:
        return jnp.where(scaled < floor, -jnp.inf, scaled)
    values, ids = jax.lax.top_k(scaled, keep)  # descending, so that the sums below run from the most probable token
    if options.nucleus:
        probabilities = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < options.top_p) | (jnp.arange(keep) == 0)
        values = jnp.where(kept, values, -jnp.inf)
    values = jnp.where(values < floor, -jnp.inf, values)
    return jnp.put_along_axis(jnp.full_like(scaled, -jnp.inf), ids, values, axis=-1, inplace=False)


def choose(logits: Array, keys: Array, options: Sampling, seen: Array) -> Array:
    """Returns the next token of each row.

    Args:
        logits: float32 [B, V].
        keys: Random keys [B]. Every row has its own, so that its tokens do not depend on the rows beside it.
        options: Greedy takes the smallest id among equal logits and uses no key.
        seen: bool [B, V], tokens that each row has already; looked at with a repetition penalty only.

    Returns:
        int32 [B].
    """
    if options.penalised:
        logits = penalise(logits, seen, options)
    if options.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, options)).astype(jnp.int32)
