"""k micro-batches == one batch, evaluation in batches of any size == one batch: sums are divided once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batches import random_batch
from slow_values import slow
from tiny_models import KINDS, random_decoder

from sft_jax.config import LossConfig
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh
from sft_jax.training import contracts, step

TERMS = LossConfig(z_loss=0.1, label_smoothing=0.2)


@pytest.mark.parametrize("name", [KINDS[0], *slow(*KINDS[1:])])
@pytest.mark.parametrize("parts", [8, *slow(2, 4)])
def test_micro_batches_equal_one_batch(name, parts):
    """Shares of supervision go from 0 to 1 over the rows; of 8 micro-batches of one row the first has no label.

    Rows of a micro-batch walk over the blocks of the attention kernel together, so there are several in each.
    """
    batch = random_batch(8, 200)
    assert not batch.weights[0].any() and batch.weights[7][batch.segments[7] > 0].all()
    result = contracts.accumulation(random_decoder(name, Options(attention="blocked")), batch, parts)
    assert result.holds, result


def test_a_mean_of_means_is_noticed(monkeypatch):
    def mean_of_means(grad_fn, state, batch, key, mesh):
        gradients, losses = jax.vmap(lambda micro: grad_fn(state.params, state.frozen, micro, key))(batch)
        mean = lambda g: jnp.mean(g / jnp.maximum(losses.weight, 1).reshape(-1, *[1] * (g.ndim - 1)), 0)  # noqa: E731
        return jax.tree.map(lambda g: mean(g) * losses.weight.sum(), gradients), losses

    monkeypatch.setattr(step, "_accumulate", mean_of_means)
    result = contracts.accumulation(random_decoder("llama"), random_batch(4, 16), 2)
    assert not result.holds and "gradient" in result.quantity


def test_evaluation_depends_on_neither_batch_size_packing_nor_mesh():
    """11 rows, which neither 3 nor 8 divides; batches of 1 and 3 do not divide over the mesh either."""

    def build(mesh):
        return random_decoder("llama", Options() if mesh is None else Options(constrain=constrain_fn(mesh)))

    meshes = {"data2_fsdp2_tensor2": make_mesh(2, 2, 2)}
    result = contracts.evaluation(build, random_batch(11, 24, seed=3), (1, 3, 8), meshes)
    assert result.holds, result


@pytest.mark.parametrize("name, chunk", [("llama", 5), ("gemma2", 7), ("llama_tied_biases", None)])
def test_chunked_loss_equals_dense_float64(name, chunk):
    for loss in (LossConfig(), TERMS):
        result = contracts.chunking(random_decoder(name), random_batch(4, 24), chunk, loss=loss)
        assert result.holds, result


@pytest.mark.slow
def test_terms_of_the_loss_do_not_depend_on_packing():
    result = contracts.packing(random_decoder("llama"), random_batch(8, 24, seed=3), TERMS)
    assert result.holds, result


def test_terms_of_the_loss_depend_on_neither_micro_batches_nor_mesh():
    """Reported for themselves, and in the gradient."""
    mesh, batch = make_mesh(2, 2, 2), random_batch(8, 24, seed=3)
    decoder, on_mesh = random_decoder("llama"), random_decoder("llama", Options(constrain=constrain_fn(mesh)))
    one, split = (jax.tree.map(lambda x, n=n: x.reshape(n, -1, *x.shape[1:]), batch) for n in (1, 2))
    plain, sums = (contracts.step_sums(decoder, one, None, loss) for loss in (LossConfig(), TERMS))
    for name, value in contracts.step_sums(on_mesh, split, mesh, TERMS).items():
        assert contracts.relative_error(value, sums[name]) <= 1e-5, name
    assert sums.keys() - plain.keys() == {"z_loss", "label_smoothing"} and sums["z_loss"] > 0.1
    assert sums["loss"] == plain["loss"]
    assert all((sums[name] != plain[name]).any() for name in sums if name.startswith("gradient"))


def test_a_result_that_is_not_a_number_does_not_hold():
    decoder = random_decoder("llama")
    weights = random_batch(2, 16)
    weights.weights[1, 0] = np.nan
    with np.errstate(invalid="ignore"):
        result = contracts.chunking(decoder, weights, None)
    assert np.isnan(result.error) and not result.holds
