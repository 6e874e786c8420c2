"""Runs that differ in learning rate, length and seed alone are one compiled program, which computes what each of them would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_batches import random_batch
from tiny_models import random_decoder

from sft_jax.config import OptimConfig
from sft_jax.model.options import Options
from sft_jax.training.optim import make_optimizer
from sft_jax.training.schedules import SCHEDULES, make_schedule
from sft_jax.training.state import create_state
from sft_jax.training.step import make_train_step

RUNS = [(1e-3, 20, 0), (3e-2, 7, 5)]  # learning rate, steps, seed


@pytest.fixture(scope="module")
def runs():
    """(state, step, numbers) of each run, on a model with noise, so that the seed counts."""
    found = []
    for rate, steps, seed in RUNS:
        decoder = jax.tree.map(jnp.copy, random_decoder("llama", Options(neftune=5.0)))
        config = OptimConfig(schedule="wsd", learning_rate=rate, warmup=2.0, decay=0.3)
        optimizer = make_optimizer(config, nnx.state(decoder), steps, seed=seed)
        graphdef, state = create_state(decoder, optimizer)
        found.append((state, make_train_step(graphdef, optimizer), optimizer.numbers))
    return found


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(lambda x: x[None], random_batch(rows=2, length=16))


def test_the_program_is_the_same_text(runs, batch):
    texts = [step.lower(state, batch, numbers).as_text() for state, step, numbers in runs]
    assert texts[0] == texts[1]
    assert len({step.lower(state, batch).as_text() for state, step, _ in runs}) == 2  # of constants they are two


def test_a_run_in_the_program_of_another_is_that_run(runs, batch):
    (_, shared, _), (state, own, numbers) = runs
    ours, theirs = jax.tree.map(jnp.copy, state), jax.tree.map(jnp.copy, state)
    for _ in range(4):
        ours, ours_metrics = shared(ours, batch, numbers)
        theirs, theirs_metrics = own(theirs, batch)
        for name in ("loss_sum", "learning_rate", "grad_norm"):
            np.testing.assert_allclose(ours_metrics[name], theirs_metrics[name], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours.params, theirs.params)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_is_given_numbers_is_that_of_the_numbers(name):
    a, b = (make_schedule(OptimConfig(schedule=name, learning_rate=rate), steps) for rate, steps, _ in RUNS)
    steps = jnp.arange(24)
    given = jax.jit(lambda numbers: a.given(numbers)(steps))(b.numbers)
    np.testing.assert_allclose(given, b(steps), rtol=1e-6, atol=1e-12)
