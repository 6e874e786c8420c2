"""Quantisation-aware training: kernels are computed with as a server will round them, and trained unrounded.

Jacob et al. 2018, arXiv:1712.05877. The gradient passes the rounding as if it were not there (straight-through, Bengio et
al. 2013, arXiv:1308.3432). Whole numbers and scales are those of qwix, and of what servers make of a checkpoint by the
symmetric schemes of compressed-tensors (vLLM) and torchao: numbers of n bits times largest / (2**(n - 1) - 1/2).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

# The largest number of a group is half-way between two whole ones, and the last bit of a scale would decide which it gets,
# on every mesh anew. With scales that are larger by this it is the nearer to zero.
_SLACK = 1e-5


@dataclass(frozen=True)
class Rounding:
    """What kernels [..., in, out] are rounded to; every output has scales of its own."""

    dtype: str
    group: int | None  # inputs that share a scale; None = all


# train.qat -> what kernels are rounded to.
ROUNDINGS: dict[str, Rounding] = {
    "int8": Rounding("int8", None),
    "int4": Rounding("int4", 32),
}


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["name", "exported_as"])
@dataclass(frozen=True)
class Unrounded:
    """A kernel [..., in, out] that is rounded where it is computed with, and held as it is."""

    values: jax.Array
    name: str  # a key of ROUNDINGS
    exported_as: str  # the dtype of the export

    def astype(self, dtype, constrain=None) -> jax.Array:
        """Returns the rounded kernel, with the gradient of what is not."""
        del constrain
        return rounded(self.values, self.name, self.exported_as).astype(dtype)


def rounded(kernel: jax.Array, name: str, exported_as: str = "float32") -> jax.Array:
    """Returns kernels [..., in, out] in float32, rounded, with the gradient of what is not.

    `name` is a key of ROUNDINGS, whose group divides `in`. What is rounded are the numbers of the export, which may be of 16
    bits: a server knows no others, and half of the int8 codes are larger than the last bit of bfloat16. The package qwix
    must be installed.
    """
    import qwix

    kind, limits = ROUNDINGS[name], jnp.finfo(exported_as)
    exact = kernel.astype(jnp.float32)
    exported = jax.lax.reduce_precision(exact, limits.nexp, limits.nmant)  # a pair of casts would be optimised away
    inputs = kernel.ndim - 2
    whole = [axis for axis in range(kernel.ndim) if axis != inputs]
    tiles = {} if kind.group is None else {inputs: kind.group}
    held = qwix.quantize(
        jax.lax.stop_gradient(exported), kind.dtype, channelwise_axes=whole, tiled_axes=tiles,
        calibration_method=f"absmax,{1 + _SLACK}",
    )  # fmt: skip
    return qwix.dequantize(held) + (exact - jax.lax.stop_gradient(exact))  # the difference is 0, its gradient is not
