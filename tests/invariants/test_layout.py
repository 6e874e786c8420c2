"""One device == eight devices, for every way to lay the model out on them."""

import re

import jax
import numpy as np
import pytest
from adapted import adapted
from flax import nnx
from random_batches import random_batch
from slow_values import slow
from tiny_models import KINDS, random_decoder

from sft_jax.config import LossConfig, OptimConfig
from sft_jax.model.options import Options
from sft_jax.model.loss import next_token_loss
from sft_jax.model.quantise import quantise
from sft_jax.model.sharding import constrain_fn, make_mesh, named_leaves, shardings
from sft_jax.training import contracts
from sft_jax.training.optim import make_optimizer
from sft_jax.training.optimizers import OPTIMIZERS
from sft_jax.training.state import abstract_state, create_state
from sft_jax.training.step import make_train_step, place_batch

MESHES = {
    "data2_fsdp2_tensor2": dict(data=2, fsdp=2, tensor=2),
    "fsdp2_context2_tensor2": dict(fsdp=2, context=2, tensor=2),
    "data8": dict(data=8),
    "fsdp8": dict(fsdp=8),
    "fsdp4_tensor2": dict(fsdp=4, tensor=2),
    "data2_context4": dict(data=2, context=4),
    "context8": dict(context=8),
}
EXPERT_MESHES = {
    "expert2_context2_tensor2": dict(expert=2, context=2, tensor=2),
    "data2_expert4": dict(data=2, expert=4),
    "fsdp2_expert2_tensor2": dict(fsdp=2, expert=2, tensor=2),
}
EXPERTS = ("gpt_oss", "qwen2_moe", "deepseek_v3")
LENGTH = 208  # rows of several blocks of the attention kernel, in up to 16 chunks


def meshes(sizes):
    return {layout: make_mesh(**{"fsdp": 1, **axes}) for layout, axes in sizes.items()}


def build(name, mesh, **options):
    return random_decoder(name, Options(**options, **({} if mesh is None else {"constrain": constrain_fn(mesh)})))


@pytest.mark.parametrize("layouts", [tuple(MESHES)[:1], *slow((tuple(MESHES)[1:],))], ids="-".join)
@pytest.mark.parametrize("name", ["llama", *slow(*KINDS[1:])])
def test_every_layout_equals_one_device(name, layouts):
    sizes = {layout: MESHES[layout] for layout in layouts}
    results = contracts.layout(lambda mesh: build(name, mesh, attention="blocked"), random_batch(8, LENGTH), meshes(sizes))
    assert results.keys() == sizes.keys()
    assert all(result.holds for result in results.values()), results


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_on_every_layout_equal_one_device(name):
    results = contracts.layout(
        lambda mesh: build(name, mesh, attention="blocked"), random_batch(8, LENGTH), meshes(EXPERT_MESHES),
        LossConfig(router_balance=0.3, router_z=0.1),
    )  # fmt: skip
    assert all(result.holds for result in results.values()), results


@pytest.mark.parametrize(
    ("name", "stored_as", "layout"),
    [
        ("llama", "", MESHES["fsdp2_context2_tensor2"]),
        *slow(
            ("llama", "nf4", MESHES["fsdp2_context2_tensor2"]),
            ("mistral", "", MESHES["data2_context4"]),
            ("deepseek_v3", "nf4", EXPERT_MESHES["expert2_context2_tensor2"]),
            ("gpt_oss", "", EXPERT_MESHES["data2_expert4"]),
            ("qwen2_moe", "int8", EXPERT_MESHES["fsdp2_expert2_tensor2"]),
        ),
    ],
)
def test_what_is_drawn_and_adapters_on_a_quantised_base_are_the_same_on_every_layout(name, stored_as, layout):
    """Noise on embeddings, and dropout in adapters where there are no experts."""

    def build_adapted(mesh):
        decoder = build(name, mesh, neftune=5.0, attention="blocked")
        decoder = quantise(decoder, stored_as) if stored_as else decoder
        return adapted(decoder, name="lora", rank=2, alpha=4, dropout=0.0 if name in EXPERTS else 0.3)

    (result,) = contracts.layout(build_adapted, random_batch(8, LENGTH), meshes({"layout": layout})).values()
    assert result.holds, result


def test_no_device_holds_the_states_of_the_whole_batch(capfd):
    """Rows and their stretches stay where they are, from the embedding on, in the forward and the backward pass."""
    mesh = make_mesh(2, 1, 2, context=2)
    decoder, batch = build("llama", mesh), random_batch(8, 24)
    decoder = jax.device_put(decoder, shardings(decoder, mesh))
    gradient = jax.jit(jax.grad(lambda decoder, batch: next_token_loss(decoder, batch, mesh).total))
    compiled = gradient.lower(decoder, place_batch(batch, mesh, batch_dim=0)).compile().as_text()
    assert "f32[4,12,32]" in compiled  # a half of the rows, and a half of each
    assert not re.search(r"f32\[(8,\d+,|4,24,)(32|56|96)\]", compiled)
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
