"""A vocabulary that is held in more rows than it has tokens: 97 in 128, which `tensor` divides."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from random_batches import random_batch
from slow_values import slow
from tiny_models import ALL_CONFIGS, randomized

from sft_jax.config import LossConfig, OptimConfig
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh
from sft_jax.training import contracts
from sft_jax.training.optim import make_optimizer
from sft_jax.training.optimizers import OPTIMIZERS
from sft_jax.training.state import create_state
from sft_jax.training.step import make_train_step, place_batch

LOSS = LossConfig(z_loss=0.1, label_smoothing=0.1)


def build(name: str, mesh) -> Decoder:
    """A decoder of 97 tokens, with random numbers in all of its rows."""
    spec = dataclasses.replace(spec_from_config(ALL_CONFIGS[name]), vocab_size=97)
    options = Options(**({} if mesh is None else {"constrain": constrain_fn(mesh)}))
    return randomized(jax.eval_shape(lambda: Decoder(spec, options, jax.random.key(0))))


@pytest.mark.parametrize("name", ["llama", *slow("gemma2")])
def test_it_is_cut_over_devices(name):
    """A head of its own, and a tied one with a cap: loss, its terms and gradient as of one device, and of float64."""
    mesh, batch = make_mesh(2, 2, 2), random_batch(8, 24, vocab=97)
    (result,) = contracts.layout(lambda mesh: build(name, mesh), batch, {"data2_fsdp2_tensor2": mesh}, LOSS).values()
    assert result.holds, result
    dense = contracts.chunking(build(name, None), batch, 7, mesh, LOSS)
    assert dense.holds, dense


@pytest.mark.parametrize("name", ["adamw", *slow(*sorted(OPTIMIZERS.keys() - {"adamw"}))])
def test_no_optimizer_moves_what_fills_it_up(name):
    """Zeros stay zeros, and every row of the head of a token moves."""
    mesh = make_mesh(1, 4, 2)
    spec = build("llama", mesh).spec
    decoder = Decoder(spec, Options(constrain=constrain_fn(mesh)), jax.random.key(0))
    optimizer = make_optimizer(OptimConfig(name=name, learning_rate=0.1, weight_decay=0.1), nnx.state(decoder), 4)
    graphdef, state = create_state(decoder, optimizer, mesh)
    step = make_train_step(graphdef, optimizer, mesh, LOSS)
    before = np.asarray(state.params["lm_head"]["kernel"][...])
    for seed in range(3):
        batch = jax.tree.map(lambda x: x[None], random_batch(8, 24, seed, vocab=97))
        state, metrics = step(state, place_batch(batch, mesh, batch_dim=1))
        assert metrics["nonfinite"] == 0
    embedding, head = (np.asarray(state.params[part][leaf][...]) for part, leaf in (("embed", "embedding"), ("lm_head", "kernel")))
    assert not embedding[97:].any() and not head[:, 97:].any()
    assert (head != before)[:, :97].all() and embedding[:97].all()
