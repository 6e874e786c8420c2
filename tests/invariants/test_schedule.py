"""The learning rates that a run reports are the closed form, counted in updates and in nothing else."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_batches import random_batch
from tiny_models import random_decoder

from sft_jax.config import OptimConfig
from sft_jax.training.optim import make_optimizer
from sft_jax.training.state import create_state
from sft_jax.training.step import make_train_step

TOTAL, WARMUP, PEAK, FINAL = 9, 3, 2e-3, 0.1


def closed_form(update: int) -> float:
    """Linear to the peak, which the third update has, then half a cosine to a tenth of it, which the ninth has."""
    if update < WARMUP:
        return PEAK * (update + 1) / WARMUP
    done = (update - WARMUP + 1) / (TOTAL - WARMUP)
    return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)


@functools.cache
def compiled():
    decoder = random_decoder("llama")
    config = OptimConfig(schedule="cosine", warmup=float(WARMUP), learning_rate=PEAK, final_fraction=FINAL)
    optimizer = make_optimizer(config, nnx.state(decoder), TOTAL)
    graphdef, state = create_state(decoder, optimizer)
    return lambda: jax.tree.map(jnp.copy, state), make_train_step(graphdef, optimizer)


def micro(batch, parts):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


@pytest.mark.parametrize("parts", [1, 4])
def test_trace_is_the_closed_form(parts):
    new_state, step = compiled()
    state, rates = new_state(), []
    for update in range(TOTAL):
        state, metrics = step(state, micro(random_batch(4, 16, seed=update), parts))
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [closed_form(update) for update in range(TOTAL)], rtol=1e-6)
    assert rates[-1] == np.float32(PEAK) * np.float32(FINAL)


def test_a_skipped_step_is_not_counted():
    new_state, step = compiled()
    state = new_state()
    good, empty = micro(random_batch(4, 16), 1), micro(random_batch(4, 16, weights="none"), 1)
    rates = []
    for batch in (good, empty, good, empty, empty, good, good):
        state, metrics = step(state, batch)
        if not metrics["empty"]:
            rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [closed_form(update) for update in range(4)], rtol=1e-6)
