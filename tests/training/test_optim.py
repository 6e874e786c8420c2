"""Optimizers against independent implementations, schedules against their closed forms, groups as data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILY_CONFIGS, abstract

from sft_jax.config import OptimConfig
from sft_jax.errors import UserError
from sft_jax.training.optim import OPTIMIZERS, SCHEDULES, choose_groups, make_optimizer, make_schedule

RNG = np.random.default_rng(0)
PARAMS = {
    "embed": {"embedding": RNG.normal(size=(8, 4)).astype(np.float32)},
    "mlp": {"kernel": RNG.normal(size=(4, 6)).astype(np.float32), "bias": RNG.normal(size=6).astype(np.float32)},
    "norm": {"scale": RNG.normal(size=4).astype(np.float32)},
}
STEPS = jnp.arange(405)


def closed_form(schedule: str, step: int, total: int, peak: float, warmup: int, final: float) -> float:
    """The learning rate in Python floats, written apart from the code."""
    if step < warmup:
        return peak * (step + 1) / warmup
    first = max(warmup, 1) - 1  # the update that has the peak
    done = min((step - first) / (total - 1 - first), 1.0)
    return peak * {
        "constant": 1.0,
        "linear": 1 - (1 - final) * done,
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * done)) / 2,
    }[schedule]


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    total=st.integers(2, 400),
    warmup=st.integers(0, 50),
    final=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_schedule_is_its_closed_form_and_reaches_its_end(schedule, total, warmup, final):
    warmup = min(warmup, total - 1)
    final = 0.0 if schedule == "constant" else final
    config = OptimConfig(schedule=schedule, learning_rate=3e-4, warmup=float(warmup), final_fraction=final)
    rates = np.asarray(make_schedule(config, total)(STEPS))  # always the same shape, so that it compiles once
    expected = [closed_form(schedule, step, total, 3e-4, warmup, final) for step in range(len(STEPS))]
    np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=3e-11)
    assert rates.dtype == np.float32
    end = 1.0 if schedule == "constant" else final
    assert rates[total - 1] == np.float32(3e-4) * np.float32(end)  # exactly
    assert (rates[total - 1 :] == rates[total - 1]).all()
    np.testing.assert_allclose(rates[max(warmup - 1, 0)], 3e-4, rtol=2e-7)


def test_warmup_below_one_is_a_fraction():
    config = OptimConfig(schedule="linear", learning_rate=1.0)
    for fraction, total, steps in ((0.1, 50, 5), (0.03, 10, 0), (0.99, 5, 4), (0.5, 1, 0)):
        as_fraction = make_schedule(_with(config, warmup=fraction), total)(STEPS)
        as_steps = make_schedule(_with(config, warmup=float(steps)), total)(STEPS)
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
        ({"schedule": "constant", "final_fraction": 0.5}, 9, ("optim.final_fraction", "constant")),
    ],
)
def test_a_wrong_schedule_names_its_key(changes, total, words):
    with pytest.raises(UserError) as error:
        make_schedule(_with(OptimConfig(), **changes), total)
    assert all(word in str(error.value) for word in words)


def test_adamw_is_adamw():
    """Against Loshchilov & Hutter's algorithm 2 in float64, some parameters with a decay and a rate of their own."""
    groups = ({"pattern": "bias$", "weight_decay": 0.5}, {"pattern": "^mlp", "learning_rate": 0.25})
    config = OptimConfig(
        learning_rate=0.01, schedule="cosine", warmup=2.0, weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-6, groups=groups
    )
    optimizer = make_optimizer(config, PARAMS, total_steps=7)
    decay = {"embed.embedding": 0.1, "mlp.kernel": 0.1, "mlp.bias": 0.5, "norm.scale": 0.0}
    factor = {"embed.embedding": 1.0, "mlp.kernel": 0.25, "mlp.bias": 1.0, "norm.scale": 1.0}
    params, state = PARAMS, optimizer.init(PARAMS)
    flat = {f"{a}.{b}": x.astype(np.float64) for a, part in PARAMS.items() for b, x in part.items()}
    moments = {name: (0.0, 0.0) for name in flat}
    update = jax.jit(optimizer.update)
    for step in range(7):
        gradient = jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32), PARAMS)
        params, state = update(gradient, state, params, jnp.int32(step))
        for name in flat:
            g = gradient[name.split(".")[0]][name.split(".")[1]].astype(np.float64)
            m, v = moments[name]
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            moments[name] = m, v
            direction = m / (1 - 0.8 ** (step + 1)) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-6)
            lr = closed_form("cosine", step, 7, 0.01, 2, 0.0) * factor[name]
            flat[name] = flat[name] - lr * (direction + decay[name] * flat[name])
    for name, expected in flat.items():
        top, leaf = name.split(".")
        np.testing.assert_allclose(params[top][leaf], expected, rtol=2e-6, atol=2e-7, err_msg=name)


def test_adafactor_is_optax_adafactor_layer_by_layer():
    """A stack of three layers moves as three matrices do; large enough that second moments are factored."""
    layers = RNG.normal(size=(3, 130, 140)).astype(np.float32) * np.array([1.0, 0.1, 10.0], np.float32)[:, None, None]
    config = OptimConfig(name="adafactor", learning_rate=0.02, schedule="constant", warmup=0.0, weight_decay=0.3)
    params = nnx.State({"kernel": nnx.Param(jnp.asarray(layers), axes=("layers", "embed", "mlp"))})
    optimizer = make_optimizer(config, params, total_steps=4)
    reference = optax.adafactor(0.02, weight_decay_rate=0.02 * 0.3)
    single = [jnp.asarray(layer) for layer in layers]
    state, states = jax.jit(optimizer.init)(params), [reference.init(layer) for layer in single]
    update, reference_update = jax.jit(optimizer.update), jax.jit(reference.update)
    for step in range(4):
        gradient = RNG.normal(size=layers.shape).astype(np.float32)
        params, state = update(
            nnx.State({"kernel": params["kernel"].replace(jnp.asarray(gradient))}), state, params, jnp.int32(step)
        )
        for index, g in enumerate(gradient):
            updates, states[index] = reference_update(jnp.asarray(g), states[index], single[index])
            single[index] = optax.apply_updates(single[index], updates)
    np.testing.assert_allclose(params["kernel"][...], np.stack(single), rtol=1e-5, atol=1e-6)
    assert max(x.size for x in jax.tree.leaves(state)) < layers.size / 10  # factored


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_quadratic(name):
    config = OptimConfig(name=name, learning_rate=0.05, schedule="constant", warmup=0.0)
    params = {"kernel": jnp.ones((4, 4))}
    optimizer = make_optimizer(config, params, total_steps=20)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(20):
        params, state = update(params, state, params, jnp.int32(step))  # gradient of |p|^2 / 2
    assert float(jnp.abs(params["kernel"]).max()) < 0.75


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_weight_decay_is_for_kernels_and_embeddings(name):
    choices = choose_groups(OptimConfig(weight_decay=0.1), nnx.state(abstract(name)))
    for choice in choices:
        matrix = choice.path.endswith((".kernel", ".embedding"))
        assert choice.weight_decay == (0.1 if matrix else 0.0), choice
        assert matrix or choice.path.endswith((".scale", ".bias"))
    assert {choice.weight_decay for choice in choices} == {0.0, 0.1}


def test_biases_are_not_decayed():
    choices = choose_groups(OptimConfig(weight_decay=0.1), nnx.state(abstract("llama_tied_biases")))
    biases = [choice for choice in choices if choice.path.endswith(".bias")]
    assert biases and all(choice.weight_decay == 0.0 for choice in biases)


def test_the_first_group_that_matches_wins_and_is_logged():
    groups = (
        {"pattern": r"attention\.value"},  # shielded from what follows
        {"pattern": r"attention\.", "freeze": True},
        {"pattern": "kernel", "learning_rate": 0.1, "weight_decay": 0.0},
    )
    optimizer = make_optimizer(OptimConfig(weight_decay=0.01, groups=groups), nnx.state(abstract("llama")), 10)
    by_path = {choice.path: choice for choice in optimizer.choices}
    value, query, up = (by_path[f"runs.0.0.{part}.kernel"] for part in ("attention.value", "attention.query", "mlp.up"))
    assert (value.frozen, value.learning_rate, value.weight_decay) == (False, 1.0, 0.01)
    assert value.pattern == r"attention\.value"
    assert query.frozen and query.pattern == r"attention\."
    assert (up.frozen, up.learning_rate, up.weight_decay) == (False, 0.1, 0.0)
    assert by_path["embed.embedding"].pattern == ""
    lines = optimizer.log()
    assert len(lines) == len(by_path) == len(jax.tree.leaves(nnx.state(abstract("llama"))))
    (line,) = [line for line in lines if line.startswith("runs.0.0.mlp.up.kernel")]
    assert "3x32x56" in line and "x0.1" in line and "(kernel)" in line
    assert "frozen" in next(line for line in lines if line.startswith("runs.0.0.attention.query.kernel"))


@pytest.mark.parametrize(
    "groups, words",
    [
        (({"pattern": "lm_haed"},), ("groups[0].pattern", "'lm_haed'", "matches no parameter", "embed.embedding")),
        (({"pattern": "mlp"}, {"pattern": "mlp.kernel"}), ("groups[1].pattern", "'mlp.kernel'", "earlier group")),
        (({"pattern": "("},), ("groups[0].pattern", "regular expression")),
        (({"pattern": ".", "freeze": True},), ("every parameter",)),
        (({"pattern": "mlp", "freeze": 1},), ("groups[0].freeze",)),
        (({"pattern": "mlp", "learning_rate": -1.0},), ("groups[0].learning_rate", "-1.0")),
        (({"pattern": "mlp", "weight_decay": "0.1"},), ("groups[0].weight_decay", "'0.1'")),
        (({"pattern": "mlp", "freeze": True, "weight_decay": 0.1},), ("groups[0].weight_decay", "freeze")),
    ],
)
def test_a_wrong_group_names_itself(groups, words):
    with pytest.raises(UserError) as error:
        choose_groups(OptimConfig(groups=groups), PARAMS)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "changes, words",
    [({"name": "adamv"}, ("optim.name", "adamw")), ({"name": "adafactor", "b2": 0.9}, ("optim.b2", "adafactor"))],
)
def test_a_wrong_optimizer_names_its_key(changes, words):
    with pytest.raises(UserError) as error:
        make_optimizer(_with(OptimConfig(), **changes), PARAMS, 5)
    assert all(word in str(error.value) for word in words)


def test_bfloat16_parameters_learn_from_updates_below_their_resolution():
    """200 updates of 1e-5 to weights of 0.02, whose neighbours in bfloat16 are 1.2e-4 away."""
    params = {"kernel": jnp.full((64, 64), 0.02, jnp.bfloat16)}
    start = float(params["kernel"][0, 0])
    config = OptimConfig(learning_rate=1e-5, schedule="constant", warmup=0.0)
    optimizer = make_optimizer(config, params, total_steps=200)
    state = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
    update = jax.jit(optimizer.update)
    for step in range(200):
        params, state = update({"kernel": jnp.ones((64, 64))}, state, params, jnp.int32(step))
    assert params["kernel"].dtype == jnp.bfloat16
    moved = np.asarray(params["kernel"], np.float64) - start
    assert abs(moved.mean() / -200e-5 - 1) < 0.04  # the first moment, in bfloat16, comes within 0.02 of its limit of 1
    one, again, other = (
        update({"kernel": jnp.ones((64, 64))}, state, params, jnp.int32(step))[0]["kernel"] for step in (199, 199, 200)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()  # the bits depend on the step


def _with(config: OptimConfig, **changes) -> OptimConfig:
    return OptimConfig(**{**config.__dict__, **changes})
