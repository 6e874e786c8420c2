"""One device == eight devices, for every way to lay the model out on them."""

import jax
import numpy as np
import pytest
from flax import nnx
from random_batches import random_batch
from slow_values import slow
from tiny_models import KINDS, random_decoder

from sft_jax.config import OptimConfig
from sft_jax.model.options import Options
from sft_jax.model.loss import next_token_loss
from sft_jax.model.sharding import constrain_fn, make_mesh, named_leaves, shardings
from sft_jax.training import contracts
from sft_jax.training.optim import make_optimizer
from sft_jax.training.optimizers import OPTIMIZERS
from sft_jax.training.state import abstract_state, create_state
from sft_jax.training.step import make_train_step, place_batch

MESHES = {"data8": (8, 1, 1), "fsdp8": (1, 8, 1), "fsdp4_tensor2": (1, 4, 2), "data2_fsdp2_tensor2": (2, 2, 2)}


def build(name, mesh, **options):
    return random_decoder(name, Options(**options, **({} if mesh is None else {"constrain": constrain_fn(mesh)})))


@pytest.mark.parametrize("name", ["llama", *slow(*KINDS[1:])])
def test_every_layout_equals_one_device(name):
    """In rows of several blocks of the attention kernel."""
    meshes = {layout: make_mesh(*sizes) for layout, sizes in MESHES.items()}
    results = contracts.layout(lambda mesh: build(name, mesh, attention="blocked"), random_batch(8, 200), meshes)
    assert results.keys() == MESHES.keys()
    assert all(result.holds for result in results.values()), results


def test_noise_on_embeddings_is_the_same_on_every_layout():
    meshes = {"data2_fsdp2_tensor2": make_mesh(2, 2, 2)}
    (result,) = contracts.layout(lambda mesh: build("llama", mesh, neftune=5.0), random_batch(8, 24), meshes).values()
    assert result.holds, result


def test_no_device_holds_the_states_of_the_whole_batch(capfd):
    """Rows stay where they are, from the embedding on, in the forward and the backward pass."""
    mesh = make_mesh(2, 2, 2)
    decoder, batch = build("llama", mesh), random_batch(8, 24)
    decoder = jax.device_put(decoder, shardings(decoder, mesh))
    gradient = jax.jit(jax.grad(lambda decoder, batch: next_token_loss(decoder, batch, mesh).total))
    compiled = gradient.lower(decoder, place_batch(batch, mesh, batch_dim=0)).compile().as_text()
    assert "f32[2,24,32]" in compiled  # a quarter of the rows
    assert "f32[8,24," not in compiled
    assert "Involuntary full rematerialization" not in capfd.readouterr().err  # XLA's own warning of the same


def test_another_decoder_is_noticed():
    def other(mesh):
        return build("llama", None) if mesh is None else jax.tree.map(lambda x: x * 1.001, build("llama", mesh))

    assert not contracts.layout(other, random_batch(8, 16), {"data8": make_mesh(8, 1, 1)})["data8"].holds


@pytest.mark.parametrize("name", ["adamw", *slow(*sorted(OPTIMIZERS.keys() - {"adamw"}))])
def test_updates_equal_those_of_one_device_and_keep_the_layout(name):
    """Four updates with accumulation; the state comes back laid out as it was, and the step compiles once."""
    batch = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), random_batch(16, 16))
    params = {}
    for mesh in (None, make_mesh(1, 4, 2)):
        decoder = jax.tree.map(jax.numpy.copy, build("llama", mesh))
        optimizer = make_optimizer(OptimConfig(name=name, learning_rate=1e-2), nnx.state(decoder), 4)
        graphdef, state = create_state(decoder, optimizer, mesh)
        layout = jax.tree.map(lambda x: x.sharding, state)
        train_step = make_train_step(graphdef, optimizer, mesh)
        for _ in range(4):
            state, metrics = train_step(state, place_batch(batch, mesh, batch_dim=1))
        assert metrics["nonfinite"] == 0 and state.step == 4
        same = jax.tree.map(lambda x, was: x.sharding.is_equivalent_to(was, x.ndim), state, layout)
        assert all(jax.tree.leaves(same))
        if mesh is not None:
            assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(metrics))
        params[mesh] = [np.asarray(x) for x in jax.tree.leaves(state.params)]
    for one, many in zip(*params.values(), strict=True):
        np.testing.assert_allclose(one, many, atol=2e-4)  # adam divides by a root: tiny gradients differ in sign


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_lies_where_its_parameter_does(name):
    mesh = make_mesh(2, 2, 2)
    decoder = jax.tree.map(jax.numpy.copy, build("llama", mesh))
    optimizer = make_optimizer(OptimConfig(name=name), nnx.state(decoder), 4)
    _, expected = abstract_state(decoder, optimizer, mesh)
    _, state = create_state(decoder, optimizer, mesh)
    params = dict(named_leaves(state.params))
    moments = {}
    for path, moment in named_leaves(state.opt_state):
        owner = next((owner for owner in params if path.endswith(f".{owner}")), None)
        if owner is not None and moment.shape == params[owner].shape:
            assert moment.get_value().sharding == params[owner].get_value().sharding, path
            moments.setdefault(owner, []).append(path)
    if name != "adafactor":  # whose moments are factored
        assert moments.keys() == params.keys()
    assert not params["lm_head.kernel"].get_value().sharding.is_fully_replicated
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
