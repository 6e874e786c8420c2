"""Experts against one token at a time in float64, and the numbers of the auxiliary losses against transformers."""

import dataclasses
from functools import partial
from math import erf

import jax
import numpy as np
import pytest
from random_batches import random_batch
from tiny_models import random_decoder, randomized

from sft_jax.config import LossConfig
from sft_jax.model.experts import Experts, choose, routed
from sft_jax.model.loss import next_token_loss
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh
from sft_jax.model.spec import ClampedGate, ExpertsSpec, RouterSpec
from sft_jax.training import contracts

PLAIN = RouterSpec("softmax", False, False, groups=1, chosen_groups=1, group_score="max", normalize=True, scale=1.0)
GROUPED = RouterSpec("sigmoid", True, True, groups=4, chosen_groups=2, group_score="top2", normalize=True, scale=1.7)
SPECS = {
    "plain": ExpertsSpec(8, 2, 12, "silu", False, PLAIN, None, False),
    "everything": ExpertsSpec(8, 3, 12, "gelu", True, GROUPED, 10, True),
    "clamped": ExpertsSpec(8, 3, 12, ClampedGate(1.3, 0.5), True, dataclasses.replace(PLAIN, bias=True), None, False),
    "scaled groups": ExpertsSpec(8, 3, 12, "silu", False, dataclasses.replace(GROUPED, group_score="max", normalize=False), None, False),
}
X = np.random.default_rng(0).normal(size=(3, 17, 16)).astype(np.float32)


def experts(spec: ExpertsSpec, mesh=None) -> Experts:
    options = Options() if mesh is None else Options(constrain=constrain_fn(mesh))
    return randomized(jax.eval_shape(lambda: Experts(spec, 16, jax.random.key(0), 0.02, "float32", options)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one_token(x, part, spec: ExpertsSpec) -> np.ndarray:
    """The output for one token: scores, groups, choice, weights and the chosen experts, one after the other."""
    value = lambda leaf: np.asarray(leaf[...], np.float64)  # noqa: E731
    x = x.astype(np.float64)
    logits = x @ value(part.router.kernel) + (value(part.router.bias) if spec.router.bias else 0.0)
    scores = sigmoid(logits) if spec.router.score == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    ranking = scores + (value(part.correction) if spec.router.correction else 0.0)
    groups = ranking.reshape(spec.router.groups, -1)
    best = groups.max(1) if spec.router.group_score == "max" else np.sort(groups, axis=1)[:, -2:].sum(1)
    open_groups = np.argsort(-best)[: spec.router.chosen_groups]
    allowed = [e for e in range(spec.count) if e // (spec.count // spec.router.groups) in open_groups]
    chosen = sorted(allowed, key=lambda e: -ranking[e])[: spec.chosen]
    weights = np.array([scores[e] for e in chosen])
    weights = (weights / weights.sum() if spec.router.normalize else weights) * spec.router.scale
    out = np.zeros(16)
    for e, weight in zip(chosen, weights, strict=True):
        bias = [value(p.bias)[e] if spec.bias else 0.0 for p in (part.gate, part.up, part.down)]
        gate, up = x @ value(part.gate.kernel)[e] + bias[0], x @ value(part.up.kernel)[e] + bias[1]
        out += weight * (gated(gate, up, spec.activation) @ value(part.down.kernel)[e] + bias[2])
    if spec.shared_size is not None:
        shared = [value(p.kernel) for p in (part.shared.gate, part.shared.up, part.shared.down)]
        y = gated(x @ shared[0], x @ shared[1], spec.activation) @ shared[2]
        out += y * (sigmoid(x @ value(part.shared_gate.kernel)) if spec.shared_gate else 1.0)
    return out


def gated(gate, up, activation):
    if isinstance(activation, ClampedGate):
        gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
        return gate * sigmoid(gate * activation.slope) * (up + 1)
    if activation == "gelu":
        return gate * 0.5 * (1 + np.vectorize(erf)(gate / np.sqrt(2))) * up
    return gate * sigmoid(gate) * up


@pytest.mark.parametrize("name", SPECS)
def test_experts_equal_one_token_at_a_time(name):
    part = experts(SPECS[name])
    out, _ = jax.jit(lambda part, x: part(x, None))(part, X)
    expected = np.array([[one_token(x, part, SPECS[name]) for x in row] for row in X])
    np.testing.assert_allclose(out, expected, atol=2e-5)


EXPERT_MESHES = {
    "tensor": dict(data=2, fsdp=2, tensor=2),
    "expert": dict(fsdp=1, expert=2, context=2, tensor=2),
    "expert8": dict(fsdp=1, expert=8),
}


@pytest.mark.parametrize(("name", "mesh"), [("everything", "expert"), ("plain", "tensor"), ("clamped", "expert8")])
def test_experts_over_a_mesh(name, mesh):
    """Values and gradients are as on one device, where some experts get no token and others nearly all, too."""
    x = np.random.default_rng(1).normal(size=(8, 6, 16)).astype(np.float32)
    if mesh == "expert8":
        x[:] = x[0, 0]  # all choose the same three
    weights = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    total = lambda part, x: (part(x, None)[0] * weights).sum()  # noqa: E731
    one, many = (
        jax.jit(jax.value_and_grad(total, (0, 1)))(experts(SPECS[name], mesh), x)
        for mesh in (None, make_mesh(**EXPERT_MESHES[mesh]))
    )
    for ours, theirs in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-5)


@partial(jax.jit, static_argnums=1)
def numbers(logits, spec, segments):
    return routed(choose(logits, None, spec.router, spec.chosen), spec, segments)


def test_balance_of_one_document_is_that_of_transformers():
    """Its mean over a document equals the loss of Switch Transformers as transformers computes it for one layer."""
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    spec = SPECS["plain"]
    logits = np.random.default_rng(3).normal(size=(1, 30, 8)).astype(np.float32)
    found = numbers(logits, spec, np.ones((1, 30), np.int32))
    expected = load_balancing_loss_func((torch.tensor(logits[0]),), num_experts=8, top_k=2)
    np.testing.assert_allclose(found.balance.mean(), expected.item(), rtol=1e-5)
    np.testing.assert_allclose(found.z, np.log(np.exp(logits).sum(-1)) ** 2, rtol=1e-5)
    assert found.load.sum() == 60


def test_each_document_is_balanced_by_itself():
    """In a packed row every document has the balance that it has alone, and padding has none."""
    spec = SPECS["everything"]
    rng = np.random.default_rng(4)
    logits, segments = rng.normal(size=(1, 20, 8)).astype(np.float32), np.repeat([1, 2, 3, 0], [7, 1, 9, 3])[None]
    whole = numbers(logits, spec, segments.astype(np.int32))
    for segment in (1, 2, 3):
        here = segments[0] == segment
        part = numbers(logits[:, here], spec, np.ones((1, here.sum()), np.int32))
        np.testing.assert_allclose(whole.balance[0, here], part.balance[0], rtol=1e-6)
    assert not np.asarray(whole.balance[0, segments[0] == 0]).any() and whole.load.sum() == 3 * 17


def test_the_terms_count_as_much_as_their_coefficients_say():
    """The total grows by coefficient x term, the likelihood stays, and the routers get a gradient of it."""
    decoder, batch = random_decoder("qwen2_moe"), random_batch(3, 40)
    loss = jax.jit(lambda decoder, **terms: next_token_loss(decoder, batch, route=True, **terms))
    plain, both = loss(decoder), loss(decoder, router_balance=0.5, router_z=0.25)
    assert both.nll == plain.nll and both.expert_load.shape == (2, 8)  # layers 1 and 3 have experts
    expected = plain.total + 0.5 * plain.terms["router_balance"] + 0.25 * plain.terms["router_z"]
    np.testing.assert_allclose(both.total, expected, rtol=1e-6)
    gradients = [
        jax.grad(lambda d, c=c: loss(d, router_balance=c).total)(decoder).runs[0][1].mlp.router.kernel[...]
        for c in (0.0, 1.0)
    ]
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_with_router_terms_equal_one_batch(parts):
    terms = LossConfig(router_balance=0.3, router_z=0.1)
    result = contracts.accumulation(random_decoder("qwen2_moe"), random_batch(4, 40), parts, loss=terms)
    assert result.holds, result


@pytest.mark.slow
def test_layouts_with_router_terms_equal_one_device():
    terms = LossConfig(router_balance=0.3, router_z=0.1)
    build = lambda mesh: random_decoder("gpt_oss", Options() if mesh is None else Options(constrain=constrain_fn(mesh)))  # noqa: E731
    (result,) = contracts.layout(build, random_batch(8, 24), {"all": make_mesh(2, 2, 2)}, terms).values()
    assert result.holds, result
