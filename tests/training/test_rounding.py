"""Stochastic rounding: a neighbour, without bias, and exact where bfloat16 is."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.training.rounding import round_stochastic


@settings(max_examples=50, deadline=None)
@given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), st.integers(0, 2**31))
def test_the_result_is_a_neighbour(value, seed):
    x = jnp.full(100, value, jnp.float32)
    rounded = np.asarray(round_stochastic(x, jnp.bfloat16, jax.random.key(seed)), np.float64)
    value = float(np.float32(value))
    bits = np.float32(value).view(np.uint32)
    toward_zero = float((bits & np.uint32(0xFFFF0000)).view(np.float32))
    away = float(((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32))
    allowed = {toward_zero} if toward_zero == value else {toward_zero, away}
    assert set(rounded.tolist()) <= allowed


def test_the_expected_value_is_kept():
    for value in (1.001, -0.0203, 3.3e-9):
        x = jnp.full(100_000, value, jnp.float32)
        rounded = np.asarray(round_stochastic(x, jnp.bfloat16, jax.random.key(0)), np.float64)
        assert len(set(rounded.tolist())) == 2
        assert abs(rounded.mean() / value - 1) < 5 * 2**-8 / 2 / np.sqrt(len(x))


def test_numbers_of_bfloat16_and_infinities_stay():
    x = jnp.asarray([0.0, -0.0, 1.0, -3.5, 2.0**-120, jnp.inf, -jnp.inf], jnp.float32)
    for seed in range(20):
        np.testing.assert_array_equal(round_stochastic(x, jnp.bfloat16, jax.random.key(seed)).astype(jnp.float32), x)
