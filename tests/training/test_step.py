"""The training step against dense arithmetic and optax, and what it reports against a recomputation from logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from random_batches import SEGMENTS, random_batch
from tiny_models import CONFIGS, random_decoder

from sft_jax.config import OptimConfig
from sft_jax.evaluation.step import make_eval_step
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.loss import next_token_loss
from sft_jax.model.options import Options
from sft_jax.training import step as step_module
from sft_jax.training.optim import make_optimizer
from sft_jax.training.state import abstract_state, create_state
from sft_jax.training.step import make_train_step

# With the usual eps, Adam's first updates are the sign of the gradient, also where that is rounding error.
CLIPPED = OptimConfig(learning_rate=3e-3, schedule="linear", warmup=0.0, weight_decay=0.01, clip_norm=0.05, eps=1e-4)
CASES = {
    "clipped": CLIPPED,
    "not clipped": dataclasses.replace(CLIPPED, clip_norm=0.0),
    "far from clipped": dataclasses.replace(CLIPPED, clip_norm=1e6),
    "frozen": dataclasses.replace(CLIPPED, groups=({"pattern": r"^embed|attention\.", "freeze": True},)),
    "bfloat16": dataclasses.replace(CLIPPED, clip_norm=1.0),
}
STEPS = 13


@functools.cache
def compiled(case):
    """Static part, state and compiled step, for all tests of a case; the step must be given a copy of the state."""
    dtype = jnp.bfloat16 if case == "bfloat16" else jnp.float32
    decoder = jax.tree.map(lambda x: x.astype(dtype), random_decoder("llama"))
    optimizer = make_optimizer(CASES[case], nnx.state(decoder), STEPS)
    graphdef, state = create_state(decoder, optimizer)
    return graphdef, state, make_train_step(graphdef, optimizer)


def start(case="clipped"):
    graphdef, state, step = compiled(case)
    return graphdef, jax.tree.map(jnp.copy, state), step


def micro(batch, parts=2):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def offline(decoder, batch):
    """nll and hits of every position in numpy, from logits."""
    logits = np.asarray(decoder(batch.tokens, batch.positions, batch.segments), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    return nll, logits.argmax(-1) == batch.targets


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.grad)
def dense_gradient(params, graphdef, batch):
    """Of the mean loss, through full logits and automatic differentiation."""
    logits = nnx.merge(graphdef, params)(batch.tokens, batch.positions, batch.segments)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    return -jnp.sum(batch.weights * log_p) / jnp.sum(batch.weights)


@pytest.fixture(scope="module")
def batch():
    return random_batch(4, 24)


@pytest.mark.parametrize(
    "case", ["clipped", *(pytest.param(case, marks=pytest.mark.slow) for case in ("not clipped", "far from clipped"))]
)
def test_updates_are_those_of_optax_on_the_dense_loss(batch, case):
    """Three updates with accumulation over two micro-batches."""
    graphdef, state, step = start(case)
    params = jax.tree.map(jnp.copy, state.params)
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path), params)
    clip = [optax.clip_by_global_norm(CASES[case].clip_norm)] if CASES[case].clip_norm else []
    rates = optax.linear_schedule(3e-3, 0.0, STEPS - 1)
    reference = optax.chain(*clip, optax.adamw(rates, eps=1e-4, weight_decay=0.01, mask=decayed))
    reference_state, reference_update = reference.init(params), jax.jit(reference.update)
    for _ in range(3):
        gradient = dense_gradient(params, graphdef, batch)
        state, metrics = step(state, micro(batch))
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
        updates, reference_state = reference_update(gradient, reference_state, params)
        params = optax.apply_updates(params, updates)
    assert metrics["grad_norm"] > 0.05 and state.step == 3
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_reported_values_are_those_recomputed_from_logits(batch):
    _, state, step = start()
    nll, hits = offline(random_decoder("llama"), batch)
    _, metrics = step(state, micro(batch))
    weights = batch.weights.astype(np.float64)
    np.testing.assert_allclose(metrics["loss_sum"], (weights * nll).sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["correct"], (weights * hits).sum(), rtol=1e-6)
    assert metrics["supervised_tokens"] == (weights > 0).sum()
    assert metrics["real_tokens"] == (batch.segments > 0).sum()
    assert (metrics["nonfinite"], metrics["empty"]) == (0, 0)
    for name, values in (("per_example_loss", weights * nll), ("per_example_weight", weights)):
        expected = [[values[row][batch.segments[row] == s + 1].sum() for s in range(SEGMENTS)] for row in range(4)]
        np.testing.assert_allclose(metrics[name].reshape(4, SEGMENTS), expected, rtol=2e-5, atol=1e-6)
        assert metrics[name].shape == (2, 2, SEGMENTS)


def test_evaluation_reports_the_same(batch):
    graphdef, state, _ = start()
    nll, hits = offline(random_decoder("llama"), batch)
    loss = make_eval_step(graphdef)(state, batch)
    for found, values in zip(loss, (batch.weights * nll, batch.weights, batch.weights * hits), strict=True):
        expected = [[values[row][batch.segments[row] == s + 1].sum() for s in range(SEGMENTS)] for row in range(4)]
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_what_is_frozen_costs_and_changes_nothing(batch):
    _, state, step = start("frozen")
    frozen, before = (jax.tree.map(np.array, part) for part in (state.frozen, state.params))
    names = {dotted(path) for path, _ in nnx.to_flat_state(frozen)}
    assert "embed.embedding" in names and "runs.0.0.attention.value.kernel" in names
    assert not names & {dotted(path) for path, _ in nnx.to_flat_state(before)}
    assert len(jax.tree.leaves(state.opt_state.mu)) == len(jax.tree.leaves(state.params)) > 0
    state, metrics = step(state, micro(batch))
    jax.tree.map(np.testing.assert_array_equal, frozen, state.frozen)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True))
    graphdef, everything, _ = start()
    gradient = dense_gradient(everything.params, graphdef, batch)
    trained = [g for path, g in nnx.to_flat_state(gradient) if dotted(path) not in names]
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(trained), rtol=1e-5)


def dotted(path) -> str:
    return ".".join(map(str, path))


def test_state_is_overwritten_and_the_step_compiled_once():
    _, state, step = start()
    first = state
    for seed in range(3):
        state, _ = step(state, micro(random_batch(4, 24, seed=seed)))
    assert step._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves((first.params, first.opt_state)))


def test_accumulation_is_traced_once(monkeypatch):
    """Tracing a large model takes seconds, before anything is compiled."""
    graphdef, state, _ = start()
    traced = []
    monkeypatch.setattr(step_module, "next_token_loss", lambda *args, **options: traced.append(1) or next_token_loss(*args, **options))
    decoder = nnx.merge(graphdef, state.params, state.frozen)
    make_train_step(graphdef, make_optimizer(CLIPPED, nnx.state(decoder), STEPS)).lower(state, micro(random_batch(4, 24)))
    assert len(traced) == 1


@pytest.mark.parametrize("parts, ema", [(1, 0.9), pytest.param(2, 0.0, marks=pytest.mark.slow)])
def test_the_update_needs_no_second_copy_of_the_state(parts, ema):
    """Also where it has an average. Memory beside the state is the gradient, of one micro-batch and in sum, that of a layer, and the activations."""
    spec = spec_from_config({**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64})
    decoder = jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0)))
    optimizer = make_optimizer(OptimConfig(ema=ema), nnx.state(decoder), 5)
    graphdef, state = abstract_state(decoder, optimizer)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), micro(random_batch(2, 8), parts))
    memory = make_train_step(graphdef, optimizer).lower(state, batch).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    assert memory.alias_size_in_bytes >= (4 if ema else 3) * size
    assert memory.temp_size_in_bytes < (parts + 0.6) * size


def test_noise_on_embeddings_differs_by_step_and_micro_batch_and_never_reaches_an_evaluation(batch):
    """A batch of two equal micro-batches, made three times: at step 0, at 0 again, and at 1."""
    decoder, quiet = (random_decoder("llama", Options(neftune=strength)) for strength in (5.0, 0.0))
    optimizer = make_optimizer(dataclasses.replace(CLIPPED, learning_rate=1e-30), nnx.state(decoder), STEPS)
    graphdef, state = create_state(decoder, optimizer)
    step = make_train_step(graphdef, optimizer)
    twice = jax.tree.map(lambda x: np.stack([x, x]), batch)
    state, first = step(jax.tree.map(jnp.copy, state), twice)
    _, again = step(jax.tree.map(jnp.copy, state)._replace(step=jnp.int32(0)), twice)
    _, second = step(jax.tree.map(jnp.copy, state), twice)
    losses = [np.asarray(metrics["per_example_loss"]) for metrics in (first, again, second)]
    on = losses[0][0] > 0
    assert (losses[0][0] != losses[0][1])[on].all() and (losses[0] != losses[2])[:, on].all()
    np.testing.assert_array_equal(losses[0], losses[1])
    noisy, clean = (make_eval_step(nnx.split(d)[0])(state, batch) for d in (decoder, quiet))
    np.testing.assert_array_equal(noisy.nll, clean.nll)
    np.testing.assert_allclose(losses[0][0][on], np.asarray(clean.nll)[on], rtol=0.5)


def test_bfloat16_parameters(batch):
    _, state, step = start("bfloat16")
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, micro(batch))
        losses.append(float(metrics["loss_sum"] / metrics["weight"]))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state.nu)} == {jnp.dtype("float32")}
    assert losses[-1] < losses[0] - 0.2


def test_abstract_state_describes_the_state():
    decoder = random_decoder("gemma2")
    optimizer = make_optimizer(OptimConfig(groups=({"pattern": "norm", "freeze": True},)), nnx.state(decoder), 5)
    graphdef, state = create_state(decoder, optimizer)
    abstract_graphdef, abstract = abstract_state(jax.eval_shape(lambda: decoder), optimizer)
    assert graphdef == abstract_graphdef
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
