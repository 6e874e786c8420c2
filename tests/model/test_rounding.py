"""Gradients of parameters of 16 bits are float32 until they are rounded, once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.model.rounding import rounded, widened
from sft_jax.model.sharding import make_mesh


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rounded_is_the_nearest_number(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=2000), rng.normal(size=200) * 1e-3, [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-9]])
    x = x.astype(np.float32)
    expected = np.asarray(jnp.asarray(x), np.float32).astype(dtype)  # by ml_dtypes, in numpy
    result = jax.jit(rounded, static_argnums=1)(x, dtype)
    assert result.dtype == dtype
    np.testing.assert_array_equal(np.asarray(result, np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gradient_of_a_widened_parameter_is_rounded_once(dtype):
    rng = np.random.default_rng(1)
    rows, scale = rng.normal(size=(4096, 8)).astype(np.float32), jnp.ones(8, dtype)
    gradient = jax.jit(jax.grad(lambda scale: jnp.sum(jnp.asarray(rows) * widened(scale))))(scale)
    assert widened(scale).dtype == jnp.float32 and gradient.dtype == dtype
    exact = rows.astype(np.float64).sum(0)
    unit = float(jnp.finfo(dtype).eps)
    assert np.all(np.abs(np.asarray(gradient, np.float64) - exact) <= unit * np.abs(exact) + 1e-3)


def test_devices_add_up_what_is_not_rounded():
    """Eight parts, of which bfloat16 would lose seven: 256 + 7 * 0.5 is 259.5, and 260 once it is rounded."""
    mesh = make_mesh(fsdp=8)
    parts = jax.device_put(np.array([256.0] + [0.5] * 7, np.float32), NamedSharding(mesh, P("fsdp")))
    weight = jax.device_put(jnp.ones((), jnp.bfloat16), NamedSharding(mesh, P()))
    gradient = jax.jit(jax.grad(lambda weight: jnp.sum(parts * widened(weight))))(weight)
    assert gradient.dtype == jnp.bfloat16 and float(gradient) == 260
