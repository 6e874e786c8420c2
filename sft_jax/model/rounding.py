"""Where gradients of parameters of 16 bits are rounded: once, after they have been summed over rows and devices.

A conversion alone does not say that. Compilers hand it on to what leads to it (XLA for TPUs: BFloat16Propagation), since the
result has no more than 16 bits anyway, and so devices add up rounded numbers and round again with every device.
"""

import jax
import jax.numpy as jnp
from jax import lax


def rounded(x: jax.Array, dtype) -> jax.Array:
    """Returns float32 x in a floating `dtype`; what x is made of stays float32."""
    kind = jnp.finfo(dtype)
    return (lax.reduce_precision(x, kind.nexp, kind.nmant) if kind.bits < 32 else x).astype(dtype)


@jax.custom_vjp
def widened(parameter: jax.Array) -> jax.Array:
    """Returns a parameter in float32. Its gradient is summed in float32 and then rounded to the parameter's dtype."""
    return parameter.astype(jnp.float32)


def _forward(parameter):
    return widened(parameter), jnp.zeros((), parameter.dtype)


def _backward(like, gradient):
    return (rounded(gradient, like.dtype),)


widened.defvjp(_forward, _backward)
