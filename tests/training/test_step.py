"""The training step against dense arithmetic and optax, and what it reports against a recomputation from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from random_batches import SEGMENTS, random_batch
from tiny_models import CONFIGS, random_decoder

from sft_jax.config import OptimConfig
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.options import Options
from sft_jax.training.optim import make_optimizer
from sft_jax.training.state import abstract_state, create_state
from sft_jax.training.step import make_eval_step, make_train_step

FROZEN = ({"pattern": r"^embed|attention\.", "freeze": True},)


def start(config=OptimConfig(), name="llama", dtype=jnp.float32, steps=5):
    """A decoder of its own arrays, its state, its optimizer and its compiled step."""
    decoder = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), random_decoder(name))
    optimizer = make_optimizer(config, nnx.state(decoder), steps)
    graphdef, state = create_state(decoder, optimizer)
    return graphdef, state, make_train_step(graphdef, optimizer)


def micro(batch, parts=1):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def offline(decoder, batch):
    """nll and hits of every position in numpy, from logits."""
    logits = np.asarray(decoder(batch.tokens, batch.positions, batch.segments), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    return nll, logits.argmax(-1) == batch.targets


def dense_mean_loss(params, graphdef, batch):
    logits = nnx.merge(graphdef, params)(batch.tokens, batch.positions, batch.segments)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    return -jnp.sum(batch.weights * log_p) / jnp.sum(batch.weights)


@pytest.fixture(scope="module")
def batch():
    return random_batch(4, 24)


@pytest.mark.parametrize("clip_norm", [0.0, 0.05, 1e6])
def test_updates_are_those_of_optax_on_the_dense_loss(batch, clip_norm):
    """Three updates with accumulation over two micro-batches, clipped or not."""
    config = OptimConfig(learning_rate=3e-3, schedule="linear", warmup=0.0, weight_decay=0.01, clip_norm=clip_norm)
    graphdef, state, step = start(config)
    params = jax.tree.map(jnp.copy, state.params)
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path), params)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    reference = optax.chain(*clip, optax.adamw(optax.linear_schedule(3e-3, 0.0, 4), weight_decay=0.01, mask=decayed))
    reference_state = reference.init(params)
    gradient_of = jax.jit(jax.grad(dense_mean_loss), static_argnums=1)
    for _ in range(3):
        gradient = gradient_of(params, graphdef, batch)
        state, metrics = step(state, micro(batch, 2))
        np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(gradient), rtol=1e-5)
        updates, reference_state = reference.update(gradient, reference_state, params)
        params = optax.apply_updates(params, updates)
    assert (metrics["grad_norm"] > 0.05) and state.step == 3
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_reported_values_are_those_recomputed_from_logits(batch):
    _, state, step = start()
    nll, hits = offline(random_decoder("llama"), batch)
    _, metrics = step(state, micro(batch, 2))
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
    np.testing.assert_allclose(loss.total, (batch.weights * nll).sum(), rtol=1e-6)
    np.testing.assert_allclose(loss.correct, (batch.weights * hits).sum(), rtol=1e-6)
    np.testing.assert_allclose(loss.per_example.sum(), loss.total, rtol=1e-6)
    assert loss.count == (batch.weights > 0).sum()


def test_what_is_frozen_costs_and_changes_nothing(batch):
    graphdef, state, step = start(OptimConfig(groups=FROZEN))
    frozen = jax.tree.map(np.array, state.frozen)
    before = jax.tree.map(np.array, state.params)
    names = {".".join(map(str, path)) for path in nnx.to_flat_state(state.frozen).paths}
    assert "embed.embedding" in names and "runs.0.0.attention.value.kernel" in names
    assert not names & {".".join(map(str, path)) for path in nnx.to_flat_state(state.params).paths}
    assert len(jax.tree.leaves(state.opt_state.mu)) == len(jax.tree.leaves(state.params)) > 0
    state, metrics = step(state, micro(batch))
    jax.tree.map(np.testing.assert_array_equal, frozen, state.frozen)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True))
    gradient = jax.grad(dense_mean_loss)(nnx.state(random_decoder("llama")), nnx.graphdef(random_decoder("llama")), batch)
    trained = {path: g for path, g in nnx.to_flat_state(gradient) if ".".join(map(str, path)) not in names}
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(list(trained.values())), rtol=1e-5)


def test_state_is_overwritten_and_compiled_for_once(batch):
    _, state, step = start()
    first = state
    for seed in range(3):
        state, _ = step(state, micro(random_batch(4, 24, seed=seed)))
    assert step._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves((first.params, first.opt_state)))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_update_needs_no_second_copy_of_the_state(parts):
    """Memory beside the state is the gradient, once a micro-batch and once in sum, and the activations."""
    spec = spec_from_config({**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64})
    decoder = jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0)))
    optimizer = make_optimizer(OptimConfig(), nnx.state(decoder), 5)
    graphdef, state = abstract_state(decoder, optimizer)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), micro(random_batch(2, 8), parts))
    memory = make_train_step(graphdef, optimizer).lower(state, batch).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    assert memory.alias_size_in_bytes >= 3 * size
    assert memory.temp_size_in_bytes < (parts + 0.5) * size


def test_bfloat16_parameters(batch):
    graphdef, state, step = start(OptimConfig(learning_rate=1e-3, schedule="constant", warmup=0.0), dtype=jnp.bfloat16)
    losses = []
    for _ in range(12):
        state, metrics = step(state, micro(batch, 2))
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
    describe = lambda x: (x.shape, x.dtype)  # noqa: E731
    assert jax.tree.map(describe, state) == jax.tree.map(describe, abstract)
