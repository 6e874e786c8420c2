"""Schedules are their closed forms, and so are the rates that a run reports, counted in updates and in nothing else."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_batches import random_batch
from tiny_models import random_decoder

from sft_jax.config import OptimConfig
from sft_jax.errors import UserError
from sft_jax.training.optim import make_optimizer
from sft_jax.training.schedules import SCHEDULES, make_schedule
from sft_jax.training.state import create_state
from sft_jax.training.step import make_train_step

TOTAL, WARMUP, PEAK, FINAL = 9, 3, 2e-3, 0.1
STEPS = jnp.arange(405)


def closed_form(schedule: str, update: int, total: int, peak: float, warmup: int, final: float, decay=0, power=2.0) -> float:
    """The learning rate of update number `update` + 1 in Python floats, written apart from the code."""
    first = max(warmup, 1)  # the number of the update that has the peak
    number = update + 1
    if number <= first:
        return peak * number / first
    done = min((number - first) / (total - first), 1.0)
    falling = min(max(number - (total - decay), 0) / max(decay, 1), 1.0)
    return peak * {
        "constant": 1.0,
        "linear": 1 - (1 - final) * done,
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * done)) / 2,
        "polynomial": final + (1 - final) * (1 - done) ** power,
        "inverse_sqrt": max(math.sqrt(first / number), final),
        "wsd": 1 - (1 - final) * falling,
    }[schedule]


@settings(max_examples=120, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    total=st.integers(2, 400),
    warmup=st.integers(0, 50),
    final=st.sampled_from([0.0, 0.1, 1.0]),
    decay=st.integers(1, 400),
    power=st.sampled_from([0.5, 1.0, 3.0]),
)
@example(schedule="constant", total=42, warmup=41, final=0.0, decay=1, power=1.0)  # a quotient that is no exact 1
@example(schedule="polynomial", total=400, warmup=0, final=0.0, decay=1, power=0.5)  # steep at the end
@example(schedule="wsd", total=9, warmup=3, final=0.1, decay=6, power=1.0)  # nothing stable
@example(schedule="wsd", total=9, warmup=3, final=0.1, decay=1, power=1.0)  # a fall at the last update
def test_a_schedule_is_its_closed_form_and_reaches_its_end(schedule, total, warmup, final, decay, power):
    warmup = min(warmup, total - 1)
    decay = min(decay, total - max(warmup, 1))
    given = {"final_fraction": final, "decay": float(decay), "power": power}
    given = {key: value for key, value in given.items() if key in SCHEDULES[schedule].keys}
    config = OptimConfig(schedule=schedule, learning_rate=3e-4, warmup=float(warmup), **given)
    rates = np.asarray(make_schedule(config, total)(STEPS))  # always the same shape, so that it compiles once
    expected = [closed_form(schedule, step, total, 3e-4, warmup, final, decay, power) for step in range(len(STEPS))]
    np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=3e-11)
    assert rates.dtype == np.float32
    peak = max(warmup - 1, 0)
    np.testing.assert_allclose(rates[peak], 3e-4, rtol=2e-7)
    assert (np.diff(rates[peak:]) <= 1e-11).all()  # from the peak on it never rises
    if schedule != "inverse_sqrt":  # which has no end
        end = 1.0 if schedule == "constant" else final
        assert rates[total - 1] == np.float32(3e-4) * np.float32(end)  # exactly
        assert (rates[total - 1 :] == rates[total - 1]).all()


def test_phases_below_one_are_fractions():
    config = OptimConfig(schedule="wsd", learning_rate=1.0)
    for fraction, total, steps in ((0.1, 50, 5), (0.03, 10, 0), (0.99, 5, 4), (0.5, 1, 0)):
        as_fraction = make_schedule(dataclasses.replace(config, warmup=fraction, decay=0.01), total)(STEPS)
        as_steps = make_schedule(dataclasses.replace(config, warmup=float(steps), decay=0.01), total)(STEPS)
        np.testing.assert_array_equal(as_fraction, as_steps)
    for fraction, total, steps in ((0.1, 50, 5), (0.97, 10, 9), (0.25, 10, 2)):
        as_fraction = make_schedule(dataclasses.replace(config, decay=fraction), total)(STEPS)
        as_steps = make_schedule(dataclasses.replace(config, decay=float(steps)), total)(STEPS)
        np.testing.assert_array_equal(as_fraction, as_steps)


def test_a_run_of_one_step_has_the_peak():
    for schedule in SCHEDULES:
        assert make_schedule(OptimConfig(schedule=schedule, learning_rate=0.5), 1)(0) == 0.5


@pytest.mark.parametrize(
    "changes, total, words",
    [
        ({"schedule": "cosin"}, 9, ("optim.schedule", "cosine")),
        ({"warmup": 9.0}, 9, ("optim.warmup", "9 steps")),
        ({"warmup": 2.5}, 9, ("optim.warmup", "2.5")),
        ({"schedule": "wsd", "decay": 2.5}, 9, ("optim.decay", "2.5")),
        ({"schedule": "wsd", "decay": 7.0, "warmup": 3.0}, 9, ("optim.decay", "7", "warm-up of 3", "9 steps")),
        ({"schedule": "wsd", "decay": 0.8, "warmup": 3.0}, 9, ("optim.decay", "0.8", "warm-up of 3")),
        ({"schedule": "wsd", "decay": 0.8, "warmup": 0.5}, 9, ("optim.decay", "0.8", "warm-up of 0.5")),
        ({"schedule": "constant", "final_fraction": 0.5}, 9, ("optim.final_fraction", "constant")),
        ({"decay": 0.5}, 9, ("optim.decay", "cosine")),
        ({"schedule": "wsd", "power": 1.0}, 9, ("optim.power", "wsd")),
        ({"schedule": "inverse_sqrt", "decay": 0.2}, 9, ("optim.decay", "inverse_sqrt")),
    ],
)
def test_a_wrong_schedule_names_its_key(changes, total, words):
    with pytest.raises(UserError) as error:
        make_schedule(dataclasses.replace(OptimConfig(), **changes), total)
    assert all(word in str(error.value) for word in words)


@functools.cache
def compiled():
    decoder = random_decoder("llama")
    config = OptimConfig(schedule="cosine", warmup=float(WARMUP), learning_rate=PEAK, final_fraction=FINAL)
    optimizer = make_optimizer(config, nnx.state(decoder), TOTAL)
    graphdef, state = create_state(decoder, optimizer)
    return lambda: jax.tree.map(jnp.copy, state), make_train_step(graphdef, optimizer)


def cosine(updates: int) -> list[float]:
    return [closed_form("cosine", update, TOTAL, PEAK, WARMUP, FINAL) for update in range(updates)]


def micro(batch, parts):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


@pytest.mark.parametrize("parts", [1, 4])
def test_trace_is_the_closed_form(parts):
    new_state, step = compiled()
    state, rates = new_state(), []
    for update in range(TOTAL):
        state, metrics = step(state, micro(random_batch(4, 16, seed=update), parts))
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, cosine(TOTAL), rtol=1e-6)
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
    np.testing.assert_allclose(rates, cosine(4), rtol=1e-6)
