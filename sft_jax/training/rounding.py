"""Stochastic rounding, without which parameters in bfloat16 do not learn at the rates of fine-tuning."""

import jax
import jax.numpy as jnp


def round_stochastic(x: jax.Array, dtype, key: jax.Array) -> jax.Array:
    """Returns fp32 `x` in bfloat16, rounded up or down at random so that the expected value is `x`.

    An update of 1e-5 to a weight of 0.02 is a twelfth of the distance between neighbouring bfloat16 numbers there:
    rounded to nearest, it is lost every time (Zamirai et al., arXiv:2010.06192). Values that bfloat16 holds exactly
    stay as they are.
    """
    assert x.dtype == jnp.float32 and dtype == jnp.bfloat16, (x.dtype, dtype)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise  # carries into the upper half with the right probability
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(dtype)
