"""Products of rows with trained matrices, whose gradients are summed over rows and devices in float32.

Left to differentiation, the gradient of a matrix that is cast to 16 bits before it is read has 16 bits as well: each device
rounds its own sum, and what is added up over devices is rounded again with every device. Here the gradient leaves the product
as float32, is summed over devices as that, and only then takes the dtype of the parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sft_jax.model.options import Constrain, no_constraint
from sft_jax.model.rounding import rounded


class _Static(NamedTuple):
    precision: lax.Precision
    constrain: Constrain
    axes: tuple[str | None, ...] | None


def product(
    rows: jax.Array, matrix: jax.Array, axes: Sequence[str | None] | None = None, *,
    precision: lax.Precision, constrain: Constrain = no_constraint,
) -> jax.Array:  # fmt: skip
    """Returns rows [..., in] @ matrix [in, out] in the dtype of the rows, to which the matrix is cast.

    With the logical `axes` of a parameter its gradient is laid out by them before it is rounded to its dtype, so that devices
    add up what each of them holds in float32.
    """
    return _product(_Static(precision, constrain, None if axes is None else tuple(axes)), rows, matrix)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: _Static, rows, matrix):
    return _multiplied(static, rows, matrix)


def _multiplied(static: _Static, rows, matrix):
    return jnp.dot(rows, _read(static, rows, matrix), precision=static.precision)


def _read(static: _Static, rows, matrix):
    """Returns the matrix as it is multiplied: in the dtype of the rows, and whole where only the parameter is cut."""
    matrix = matrix.astype(rows.dtype)
    if static.axes is None or "side" not in static.axes:
        return matrix
    return static.constrain(matrix, ["act_heads" if axis == "side" else axis for axis in static.axes])


def _forward(static: _Static, rows, matrix):
    # Not _product itself, in which policies of jax.checkpoint would see no dot_general to keep.
    return _multiplied(static, rows, matrix), (rows, matrix)


def _backward(static: _Static, residuals, gradient):
    rows, matrix = residuals
    of_rows = lax.dot_general(
        gradient, _read(static, rows, matrix), (((gradient.ndim - 1,), (1,)), ((), ())), precision=static.precision
    )
    every_row = tuple(range(rows.ndim - 1))
    of_matrix = lax.dot_general(
        rows, gradient, ((every_row, every_row), ((), ())), precision=static.precision, preferred_element_type=jnp.float32
    )
    if static.axes is not None:
        of_matrix = static.constrain(of_matrix, static.axes)
    return of_rows, rounded(of_matrix, matrix.dtype)


_product.defvjp(_forward, _backward)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "gradient"], meta_fields=[])
@dataclass(frozen=True)
class Gathered:
    """Kernels [E, in, out] that a device has gathered, in the dtype that they are multiplied in.

    `gradient` is zeros that nothing reads: products give their float32 gradient to these, since that of an array has the
    array's own dtype.
    """

    values: jax.Array
    gradient: jax.Array  # fp32 [E, in, out]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(shard: jax.Array, dimension: int, names: tuple[str, ...], dtype) -> Gathered:
    """Returns kernels from the parts of `dimension` that devices along the mesh axes `names` hold, float32; in a shard_map.

    Numbers of `dtype` are gathered, and gradients of float32 are summed where each device has its part.
    """
    values = lax.all_gather(shard.astype(dtype), names, axis=dimension, tiled=True)
    return Gathered(values, jnp.zeros(values.shape, jnp.float32))


def _gathered_forward(shard, dimension, names, dtype):
    return gathered(shard, dimension, names, dtype), None


def _gathered_backward(dimension, names, dtype, _, gradient: Gathered):
    del dtype
    return (lax.psum_scatter(gradient.gradient, names, scatter_dimension=dimension, tiled=True),)


gathered.defvjp(_gathered_forward, _gathered_backward)

_OF_ROWS = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,))
_OF_KERNEL = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=())


def grouped_product(rows: jax.Array, kernel: jax.Array | Gathered, sizes: jax.Array, precision: lax.Precision) -> jax.Array:
    """Returns [N, out] of rows [N, in] in their dtype, the first sizes[0] with kernel 0 of [E, in, out], and so on."""
    values, gradient = (kernel.values, kernel.gradient) if isinstance(kernel, Gathered) else (kernel, None)
    return _grouped(precision, rows, values, gradient, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(precision, rows, values, gradient, sizes):
    del gradient
    return lax.ragged_dot(rows, values.astype(rows.dtype), sizes, precision=precision)


def _grouped_forward(precision, rows, values, gradient, sizes):
    of_gradient = None if gradient is None else ()
    return _grouped(precision, rows, values, gradient, sizes), (rows, values, of_gradient, sizes)


def _grouped_backward(precision, residuals, of_result):
    rows, values, of_gradient, sizes = residuals
    kernels = values.astype(rows.dtype)
    of_rows = lax.ragged_dot_general(of_result, kernels, sizes, _OF_ROWS, precision=precision)
    of_kernels = lax.ragged_dot_general(
        rows, of_result, sizes, _OF_KERNEL, precision=precision, preferred_element_type=jnp.float32
    )
    return of_rows, *((rounded(of_kernels, values.dtype), None) if of_gradient is None else (None, of_kernels)), None


_grouped.defvjp(_grouped_forward, _grouped_backward)
