"""A step that must not count changes nothing: the whole state is bit-equal, and the metrics say why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_batches import random_batch
from slow_values import slow
from tiny_models import random_decoder

from sft_jax.config import OptimConfig
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh
from sft_jax.training.optim import make_optimizer
from sft_jax.training.state import create_state
from sft_jax.training.step import make_train_step, place_batch

ROWS = 8


def batch_of(weights="uneven", bad_weight=None, parts=1):
    batch = random_batch(ROWS, 16, weights=weights)
    if bad_weight is not None:
        batch.weights[-1, 3] = bad_weight  # in the last micro-batch only
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


@functools.cache
def compiled(name, mesh=None):
    """The step, compiled once for all tests, and a function that makes new states for it."""
    options = Options() if mesh is None else Options(constrain=constrain_fn(mesh))
    decoder = random_decoder("llama", options)
    optimizer = make_optimizer(OptimConfig(name=name, learning_rate=1e-2, weight_decay=0.1), nnx.state(decoder), 9)
    graphdef, state = create_state(decoder, optimizer, mesh)
    return lambda: jax.tree.map(jnp.copy, state), make_train_step(graphdef, optimizer, mesh)


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("name, mesh, parts", [("adamw", (2, 2, 2), 2), *slow(("adamw", None, 1), ("adafactor", None, 2))])
def test_a_step_that_must_not_count_changes_nothing(name, mesh, parts):
    mesh = mesh and make_mesh(*mesh)
    new_state, step = compiled(name, mesh)
    state = new_state()
    put = lambda batch: place_batch(batch, mesh, batch_dim=1)  # noqa: E731
    good = put(batch_of(parts=parts))
    state, metrics = step(state, good)
    assert (metrics["nonfinite"], metrics["empty"], state.step) == (0, 0, 1)
    assert any(x.any() for x in jax.tree.leaves(state.opt_state))
    before = bits(state)
    cases = {
        "infinite loss": (put(batch_of(bad_weight=np.inf, parts=parts)), (1, 0)),
        "loss is no number": (put(batch_of(bad_weight=np.nan, parts=parts)), (1, 0)),
        "gradient overflows, loss does not": (put(batch_of(bad_weight=1e37, parts=parts)), (1, 0)),
        "nothing supervised": (put(batch_of(weights="none", parts=parts)), (0, 1)),
    }
    for case, (batch, flags) in cases.items():
        state, metrics = step(state, batch)
        assert (metrics["nonfinite"], metrics["empty"]) == flags, case
        assert bits(state) == before, case
        if flags == (0, 1):
            assert all(np.isfinite(value).all() for value in jax.tree.leaves(metrics)), "a 0 / 0 in the metrics"
    state, metrics = step(state, good)
    assert (metrics["nonfinite"], state.step) == (0, 2)  # it goes on as if nothing had been
    assert bits(state) != before


def test_parameters_that_are_not_finite_are_reported():
    new_state, step = compiled("adamw")
    state = new_state()
    broken = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    before = bits(broken)
    state, metrics = step(broken, batch_of())
    assert metrics["nonfinite"] == 1 and bits(state) == before


def test_an_unsupervised_row_has_no_influence():
    """The same update whatever the first row, which has no label, holds."""
    new_state, step = compiled("adamw")
    batch, other = batch_of(), batch_of()
    assert not batch.weights[0, 0].any()
    other.tokens[0, 0], other.targets[0, 0] = 7, 8
    (one, metrics), (two, _) = step(new_state(), batch), step(new_state(), other)
    assert bits(one) == bits(two) and metrics["loss_sum"] > 0
