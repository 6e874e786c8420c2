"""A larger vocabulary: rows of the embedding, and columns of an untied head, for tokens that a model has not had.

They begin as the mean of those that there are: a new token is then at most as probable as an average one, and takes next
to nothing from the others (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). transformers adds noise of
3e-5 of their spread, less than bfloat16 can tell apart. There is none here: tokens that occur in different places have
different gradients from the first step on.
"""

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
from sft_jax.model.sharding import is_variable, named_leaves

_DIGITS = 4  # of the numbers whose mean is taken
_DIGIT_BITS = 10  # so that int32 holds the sum of two million digits


def with_more_tokens(decoder: Decoder, larger: Decoder) -> Decoder:
    """Returns `decoder` as a decoder of more tokens, with the same new numbers on every mesh.

    `larger` is that decoder with a ShapeDtypeStruct, sharding included, in place of every parameter; the two differ in
    the size of the vocabulary only. Raises UserError where a table holds a number that is not finite.
    """
    count, new_count = decoder.spec.vocab_size, larger.spec.vocab_size
    filled = []
    for (path, new), (_, old) in zip(named_leaves(larger), named_leaves(decoder), strict=True):
        table, like = old.get_value(), new.get_value()
        if "vocab" in new.axes:
            axis = new.axes.index("vocab")
            mean = _mean(path, table, axis, count).astype(table.dtype)
            grow = partial(_grown, axis=axis, count=count, new_count=new_count, rows=like.shape[axis])
            table = jax.jit(grow, out_shardings=like.sharding)(table, mean)
        filled.append(new.replace(table))
    return jax.tree.unflatten(jax.tree.structure(larger, is_leaf=is_variable), filled)


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
