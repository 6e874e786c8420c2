"""k micro-batches == one batch, evaluation in batches of any size == one batch: sums are divided once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batches import random_batch
from tiny_models import random_decoder

from sft_jax.model.sharding import make_mesh
from sft_jax.training import contracts, step


@pytest.mark.parametrize("name, parts", [("llama", 2), ("llama", 8), ("gemma2", 4)])
def test_micro_batches_equal_one_batch(name, parts):
    """Shares of supervision go from 0 to 1 over the rows; of 8 micro-batches of one row the first has no label."""
    batch = random_batch(8, 24)
    assert parts != 8 or not batch.weights[0].any()
    result = contracts.accumulation(random_decoder(name), batch, parts)
    assert result.holds, result


def test_a_mean_of_means_is_noticed(monkeypatch):
    def mean_of_means(grad_fn, state, batch, mesh):
        gradients, losses = jax.vmap(lambda micro: grad_fn(state.params, state.frozen, micro))(batch)
        mean = lambda g: jnp.mean(g / jnp.maximum(losses.weight, 1).reshape(-1, *[1] * (g.ndim - 1)), 0)  # noqa: E731
        return jax.tree.map(lambda g: mean(g) * losses.weight.sum(), gradients), losses

    monkeypatch.setattr(step, "_accumulate", mean_of_means)
    result = contracts.accumulation(random_decoder("llama"), random_batch(4, 16), 2)
    assert not result.holds and "gradient" in result.quantity


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_evaluation_does_not_depend_on_the_batch_size(mesh):
    batch = random_batch(11, 24, seed=3)
    result = contracts.evaluation(random_decoder("llama"), batch, (1, 3, 8), mesh and make_mesh(*mesh))
    assert result.holds, result


@pytest.mark.parametrize("name, chunk", [("llama", 5), ("gemma2", 7), ("llama_tied_biases", None)])
def test_chunked_loss_equals_dense_float64(name, chunk):
    result = contracts.chunking(random_decoder(name), random_batch(4, 24), chunk)
    assert result.holds, result


def test_a_result_that_is_not_a_number_does_not_hold():
    decoder = random_decoder("llama")
    broken = jax.tree.map(lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) == 0, jnp.nan, x), decoder)
    result = contracts.chunking(broken, random_batch(2, 16), None)
    assert np.isnan(result.error) and not result.holds
