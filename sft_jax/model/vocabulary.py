"""A larger vocabulary: rows of the embedding, and columns of an untied head, for tokens that a model has not had.

They begin as the mean of those that there are: a new token is then at most as probable as an average one, and takes next
to nothing from the others (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). transformers adds noise of
3e-5 of their spread, less than bfloat16 can tell apart. There is none here: tokens that occur in different places have
different gradients from the first step on.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.errors import UserError
from sft_jax.model.decoder import Decoder
from sft_jax.model.layers import resized
from sft_jax.model.sharding import is_variable, path_name, shardings
from sft_jax.model.spec import DecoderSpec

_DIGITS = 4  # of the numbers whose mean is taken
_DIGIT_BITS = 10  # so that int32 holds the sum of two million digits


def with_more_tokens(decoder: Decoder, count: int) -> Decoder:
    """Returns a decoder without adapters as one of `count` tokens, more than it has, with the same numbers on every mesh.

    What it shares with the old one is the same arrays. Raises UserError where a table holds a number that is not finite.
    """
    spec = dataclasses.replace(decoder.spec, vocab_size=count)

    def grow(path, leaf):
        if "vocab" not in leaf.axes:
            return leaf
        table, axis = leaf.get_value(), leaf.axes.index("vocab")
        mean = _mean(path_name(path), table, axis, decoder.spec.vocab_size).astype(table.dtype)
        grown = partial(_grown, axis=axis, count=decoder.spec.vocab_size, new_count=count, rows=spec.vocab_rows)
        like = leaf.replace(jax.eval_shape(grown, table, mean))
        mesh = table.sharding.mesh if isinstance(table.sharding, NamedSharding) else None
        layout = None if mesh is None else shardings(like, mesh).get_value()
        return leaf.replace(jax.jit(grown, out_shardings=layout)(table, mean))

    larger = jax.tree_util.tree_map_with_path(grow, decoder, is_leaf=is_variable)
    larger.spec = spec
    larger.embed.vocab_size = count
    return larger


def stored_shape(leaf: nnx.Variable, spec: DecoderSpec) -> tuple[int, ...]:
    """Returns the shape of a parameter without the rows that are no tokens, which no checkpoint has."""
    shape = leaf.get_value().shape
    return tuple(spec.vocab_size if axis == "vocab" else size for axis, size in zip(leaf.axes, shape, strict=True))


def _grown(table: jax.Array, mean: jax.Array, axis: int, count: int, new_count: int, rows: int) -> jax.Array:
    """Returns `rows` entries along `axis`: the first `count` of the table, the mean up to `new_count`, then zeros."""
    table = resized(table, axis, rows)
    number = jax.lax.broadcasted_iota(jnp.int32, table.shape, axis)
    return jnp.where(number < count, table, jnp.where(number < new_count, jnp.expand_dims(mean, axis), 0))


def _mean(path: str, table: jax.Array, axis: int, count: int) -> np.ndarray:
    """Returns the mean of the first `count` entries of a matrix along `axis`, in float64.

    Sums of whole numbers are exact in any order, so the mean has the same bits however the matrix is cut.
    """
    whole = NamedSharding(table.sharding.mesh, P()) if isinstance(table.sharding, NamedSharding) else None
    sums, exponent, finite = jax.jit(partial(_digit_sums, axis=axis, count=count), out_shardings=whole)(table)
    if not finite:
        raise UserError(
            f"{path}: holds numbers that are not finite, so rows for data.add_tokens cannot begin as their mean; copy the "
            "checkpoint again."
        )
    scales = np.exp2(int(exponent) - _DIGIT_BITS * np.arange(1.0, 1 + _DIGITS))
    return np.tensordot(scales, np.asarray(sums, np.float64), 1) / count


def _digit_sums(table: jax.Array, axis: int, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes every number as 2^exponent times a fraction of n digits, and sums each digit over the entries.

    Returns sums int32 [n, D], the exponent, and whether all numbers are finite.
    """
    number = jax.lax.broadcasted_iota(jnp.int32, table.shape, axis)
    rest = jnp.where(number < count, table.astype(jnp.float32), 0)
    finite = jnp.all(jnp.isfinite(rest))  # the maximum does not tell: on a CPU it leaves NaN out
    exponent = jnp.maximum(jnp.frexp(jnp.max(jnp.abs(rest)))[1], -100)  # below it are subnormal numbers
    rest = jnp.ldexp(rest, -exponent)  # within -1 and 1
    sums = []
    for _ in range(_DIGITS):
        rest = rest * 2**_DIGIT_BITS
        digit = jnp.trunc(rest)
        rest = rest - digit
        sums.append(jnp.sum(digit.astype(jnp.int32), axis))
    return jnp.stack(sums), exponent, finite
