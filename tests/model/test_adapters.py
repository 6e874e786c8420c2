"""Adapters: what they compute, that they begin with the base, and that merging them changes nothing."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import KINDS, adapted, moved
from random_batches import random_batch
from slow_values import slow
from tiny_models import abstract, packed_rows, random_decoder, randomized

from sft_jax.errors import UserError
from sft_jax.model.adapters import AdapterPlan, adaptable, is_adapter, is_trained, plan_adapters
from sft_jax.model.attach import attach, merge
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.loss import next_token_loss
from sft_jax.model.low_rank import drop, principal_factors
from sft_jax.model.options import Options
from sft_jax.model.sharding import LAYOUT, constrain_fn, make_mesh, named_leaves, shardings
from sft_jax.training import contracts

BATCH = packed_rows(np.random.default_rng(0), 2, 24)
LABELLED = random_batch(2, 24)
logits = jax.jit(lambda decoder: decoder(*BATCH))
mean_loss = jax.jit(lambda decoder: next_token_loss(decoder, LABELLED))
BLOCKS_AND_HEAD = dict(targets=["attention", "mlp", "lm_head"])
MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "max_position_embeddings": 128, "initializer_range": 0.02, "num_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "rope_theta": 500.0,
    "decoder_sparse_step": 1, "norm_topk_prob": False, "mlp_only_layers": [1], "use_sliding_window": False,
}  # fmt: skip


def experts_decoder(options: Options = Options()) -> Decoder:
    return randomized(jax.eval_shape(lambda: Decoder(spec_from_config(MOE), options, jax.random.key(0))))


def build(name: str, options: Options = Options()) -> Decoder:
    return experts_decoder(options) if name == "experts" else random_decoder(name, options)


def loss(decoder) -> float:
    sums = mean_loss(decoder)
    return float(sums.nll / sums.weight)


def largest(x) -> float:
    return float(np.abs(np.asarray(x, np.float64)).max())


CASES = [("llama", "pissa", BLOCKS_AND_HEAD), *slow(("llama", "lora", BLOCKS_AND_HEAD), ("llama", "pissa_dora", BLOCKS_AND_HEAD))]
CASES += slow(("gemma3", "dora", {}), ("llama", "lora", dict(targets=["embed"])))
CASES += [("gemma3", "lora", dict(targets=["embed", "mlp"]))]  # a head that is tied to an embedding that is scaled
CASES += [("llama", "lora", dict(tokens=[0, 7, 95], targets=["query"]))]
CASES += slow(("gemma3", "lora", dict(tokens=[0, 7, 95], targets=["query"])), ("experts", "pissa", {}))


@pytest.mark.parametrize("name, kind, extra", CASES)
def test_new_adapters_change_nothing_and_merging_what_they_learned_neither(name, kind, extra):
    """New ones bit for bit, but for DoRA, which divides a length by itself; merged ones up to rounding."""
    base = build(name)
    new = adapted(base, trained=False, **KINDS[kind] | extra)
    size = largest(logits(base))
    assert largest(logits(new) - logits(base)) <= (1e-5 * size if "dora" in kind else 0.0)
    assert abs(loss(new) - loss(base)) <= (1e-5 if "dora" in kind else 0.0)
    trained = moved(new)
    plain = merge(trained)
    assert jax.tree.structure(plain) == jax.tree.structure(base)
    attached = logits(trained)
    assert largest(attached - logits(base)) > 1e-2 * size, "the adapters do nothing"
    assert largest(attached - logits(plain)) <= 1e-5 * largest(attached)
    np.testing.assert_allclose(loss(trained), loss(plain), rtol=1e-5)


@pytest.mark.parametrize("kind", ["pissa_dora", *slow("rslora")])
def test_merged_kernels_are_those_of_the_papers(kind):
    """In float64, layer by layer of a stack."""
    settings = KINDS[kind]
    trained = adapted(random_decoder("gemma3"), **settings)
    params = {path: np.asarray(leaf[...], np.float64) for path, leaf in named_leaves(trained)}
    merged = {path: np.asarray(leaf[...]) for path, leaf in named_leaves(merge(trained))}
    scale = settings["alpha"] / (np.sqrt(settings["rank"]) if settings.get("rslora") else settings["rank"])
    for path in ("runs.0.1.attention.query", "runs.1.0.mlp.down"):
        part = {name: params[f"{path}.adapter.{name}"] for name in ("a", "b")}
        for layer, kernel in enumerate(params[f"{path}.kernel"]):
            changed = kernel + scale * part["a"][layer] @ part["b"][layer]
            if "pissa" in kind:
                changed -= scale * params[f"{path}.adapter.start_a"][layer] @ params[f"{path}.adapter.start_b"][layer]
            if "dora" in kind:
                lengths = np.linalg.norm(changed, axis=0)
                changed *= params[f"{path}.adapter.magnitude"][layer] / lengths
            np.testing.assert_allclose(merged[f"{path}.kernel"][layer], changed, atol=1e-5)


def test_gradients_are_those_of_a_dense_model():
    """Through kernels that are added up outside of the decoder; the length that DoRA divides by is a constant."""
    base = random_decoder("llama_tied_biases")
    trained = adapted(base, **KINDS["pissa_dora"])
    ours = jax.jit(jax.grad(lambda d: next_token_loss(d, LABELLED).total))(trained)

    @jax.jit
    @jax.grad
    def dense(factors):
        decoder = jax.tree.map(lambda leaf: leaf, base)
        for path, node in adaptable(decoder):
            if path.startswith("runs"):
                a, b, a0, b0, magnitude = factors[path]
                kernel = node.kernel[...] + 2.0 * (jnp.einsum("lir,lro->lio", a, b) - jnp.einsum("lir,lro->lio", a0, b0))
                kernel *= (magnitude / jax.lax.stop_gradient(jnp.linalg.norm(kernel, axis=1)))[:, None]
                node.kernel = node.kernel.replace(kernel)
        return next_token_loss(decoder, LABELLED).total

    factors = {
        path: tuple(getattr(node.adapter, name)[...] for name in ("a", "b", "start_a", "start_b", "magnitude"))
        for path, node in adaptable(trained)
        if path.startswith("runs")
    }
    expected = dense(factors)
    assert len(expected) == 7
    for path, node in adaptable(ours):
        for name, reference in zip(("a", "b"), expected.get(path, ()), strict=False):
            found = getattr(node.adapter, name)[...]
            assert largest(found - reference) <= 1e-4 * largest(reference), (path, name)
        if path in expected:
            assert largest(node.adapter.magnitude[...] - expected[path][4]) <= 1e-4 * largest(expected[path][4])


@pytest.mark.parametrize("name, kind, extra", [
    ("llama", "pissa", BLOCKS_AND_HEAD), ("llama", "dora", BLOCKS_AND_HEAD), ("gemma3", "lora", dict(targets=["embed"])),
    ("gemma2", "lora", dict(tokens=[0, 7, 95], targets=["query"])),
])  # fmt: skip
def test_chunked_loss_equals_dense_float64(name, kind, extra):
    decoder = adapted(build(name), **KINDS[kind] | extra)
    for mesh in (None, make_mesh(2, 2, 2)):
        result = contracts.chunking(decoder, random_batch(4, 24), 7, mesh)
        assert result.holds, result


@pytest.mark.parametrize("name, kind, extra", [
    ("llama", "pissa_dora", BLOCKS_AND_HEAD), *slow(("experts", "pissa", {})),
    pytest.param("gemma3", "lora", dict(targets=["embed", "attention"]), marks=pytest.mark.slow),
    pytest.param("gemma2", "lora", dict(tokens=[0, 7, 95], targets=["mlp"]), marks=pytest.mark.slow),
])  # fmt: skip
def test_every_layout_equals_one_device(name, kind, extra):
    def decoder(mesh):
        options = Options() if mesh is None else Options(constrain=constrain_fn(mesh))
        return adapted(build(name, options), **KINDS[kind] | extra)

    meshes = {"data2_fsdp2_tensor2": make_mesh(2, 2, 2)}
    results = contracts.layout(decoder, random_batch(8, 24), meshes)
    assert all(result.holds for result in results.values()), results


def test_adapters_lie_as_their_kernels_do():
    """Cut where the kernel is, and the side without the hidden size over all devices; drawn on a mesh as on one device."""
    mesh = make_mesh(1, 4, 2)
    base = random_decoder("llama")
    placed = jax.device_put(base, shardings(base, mesh))
    settings = dict(KINDS["pissa_dora"], targets=["attention", "lm_head"])
    alone, laid_out = adapted(base, trained=False, **settings), adapted(placed, trained=False, **settings)
    specs = {path: leaf.get_value().sharding.spec for path, leaf in named_leaves(laid_out)}
    assert specs["runs.0.0.attention.query.adapter.a"] == jax.sharding.PartitionSpec(None, LAYOUT["embed"], None)
    assert specs["runs.0.0.attention.query.adapter.b"] == jax.sharding.PartitionSpec(None, None, LAYOUT["side"])
    assert specs["runs.0.0.attention.output.adapter.a"] == jax.sharding.PartitionSpec(None, LAYOUT["side"], None)
    for (path, ours), (_, theirs) in zip(adaptable(laid_out), adaptable(alone), strict=True):
        if ours.adapter is not None:  # products, since factors turn with the last bits of a sum
            np.testing.assert_allclose(
                ours.adapter.a[...] @ ours.adapter.b[...], theirs.adapter.a[...] @ theirs.adapter.b[...], atol=1e-4, err_msg=path
            )
    for (path, leaf), (_, before) in zip(named_leaves(merge(laid_out)), named_leaves(placed), strict=True):
        assert leaf.get_value().sharding == before.get_value().sharding, path


def test_abstract_decoders_are_adapted_without_computing():
    base = abstract("gemma3")
    plan = plan_adapters(base, **KINDS["pissa_dora"])
    empty = attach(base, plan, jax.random.key(0))
    full = attach(random_decoder("gemma3"), plan, jax.random.key(0))
    assert jax.tree.structure(empty) == jax.tree.structure(full)
    for (path, x), (_, y) in zip(named_leaves(empty), named_leaves(full), strict=True):
        assert (x.get_value().shape, x.get_value().dtype) == (y.get_value().shape, y.get_value().dtype), path
    assert isinstance(jax.tree.leaves(empty)[0], jax.ShapeDtypeStruct)
    assert jax.tree.structure(merge(empty)) == jax.tree.structure(base)


def test_a_plan_survives_json():
    plan = plan_adapters(abstract("llama"), **KINDS["pissa_dora"], dropout=0.1, train=["norm"], tokens=[5, 3])
    assert plan.tokens == (3, 5) and "final_norm.scale" in plan.trained
    assert AdapterPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_default_targets_are_the_projections_of_the_blocks():
    paths = [module.path for module in plan_adapters(experts_decoder(), name="lora", rank=2, alpha=4).modules]
    assert {path.removeprefix("runs.0.0.") for path in paths if path.startswith("runs.0.0.")} == {
        *(f"attention.{part}" for part in ("query", "key", "value", "output")),
        *(f"mlp.{part}" for part in ("gate", "up", "down")), *(f"mlp.shared.{part}" for part in ("gate", "up", "down")),
    }  # fmt: skip
    assert not {"embed", "lm_head"} & set(paths)


def test_routers_carry_no_adapter():
    """With a bias too: their projection is not computed as others are."""
    decoder = abstract("gpt_oss")
    assert "runs.0.0.mlp.router.bias" in dict(named_leaves(decoder))
    assert not [path for path, _ in adaptable(decoder) if "router" in path]


def test_draws_do_not_depend_on_what_else_is_adapted():
    few = adapted(random_decoder("llama"), trained=False, name="lora", rank=2, alpha=4, targets=["query"])
    many = adapted(random_decoder("llama"), trained=False, name="lora", rank=2, alpha=4)
    path = "runs.0.0.attention.query.adapter.a"
    a, other = (dict(named_leaves(decoder))[path][...] for decoder in (few, many))
    np.testing.assert_array_equal(a, other)
    assert largest(a) <= 32**-0.5 and largest(a) > 0.9 * 32**-0.5  # as PEFT: uniform within 1 / sqrt(in)
    assert largest(a[0] - a[1]) > 0.1, "layers of a stack were drawn alike"


def test_trained_parameters():
    decoder = adapted(random_decoder("llama"), **KINDS["pissa_dora"], train=["final_norm"], tokens=[1])
    trained = {path for path, _ in named_leaves(decoder) if is_trained(decoder.adapters, path)}
    query = "runs.0.0.attention.query"
    assert {f"{query}.adapter.a", f"{query}.adapter.b", f"{query}.adapter.magnitude"} <= trained
    assert {"embed.token_rows.rows", "head_rows.rows", "final_norm.scale"} <= trained
    assert not {f"{query}.kernel", f"{query}.adapter.start_a", f"{query}.adapter.start_b", "embed.embedding"} & trained
    assert is_adapter(f"{query}.adapter.start_a") and not is_adapter(f"{query}.kernel")


def test_principal_part_is_that_of_a_full_decomposition():
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(2, 40, 60)) * np.geomspace(1, 1e-2, 60)
    a, b = principal_factors(jax.random.key(0), jnp.asarray(kernels, jnp.float32), rank=4, scale=2.0)
    for layer, kernel in enumerate(kernels):
        left, lengths, right = np.linalg.svd(kernel, full_matrices=False)
        np.testing.assert_allclose(2.0 * a[layer] @ b[layer], (left[:, :4] * lengths[:4]) @ right[:4], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(a[layer], axis=0), np.linalg.norm(b[layer], axis=1), rtol=1e-4)


# ---- dropout


def test_dropout_keeps_the_mean_and_drops_the_share():
    rows = jnp.ones((200, 500))
    dropped = np.asarray(drop(rows, 0.2, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.8)}
    assert abs((dropped == 0).mean() - 0.2) < 0.01 and abs(dropped.mean() - 1) < 0.01
    assert drop(rows, 0.2, None) is rows and drop(rows, 0.0, jax.random.key(0)) is rows


def test_dropout_follows_its_key_alone():
    """Other keys give other states, remat repeats what it recomputes, and evaluation has none."""
    settings = KINDS["dora"] | dict(dropout=0.3)
    decoder = adapted(random_decoder("llama"), **settings)
    hidden = jax.jit(lambda d, key: d.hidden(*BATCH, key))
    one, same, other, without = (
        hidden(decoder, key) for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)
    )
    np.testing.assert_array_equal(one, same)
    assert largest(one - other) > 1e-3 and largest(one - without) > 1e-3
    total = lambda d: next_token_loss(d, LABELLED, key=jax.random.key(3)).total  # noqa: E731
    kept, recomputed = (
        jax.jit(jax.value_and_grad(total))(adapted(random_decoder("llama", Options(remat=remat)), **settings))
        for remat in ("none", "full")
    )
    for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(largest(y), 1e-3))


def test_dropout_is_that_of_the_paper():
    """One projection, with the mask that its key draws."""
    decoder = adapted(random_decoder("llama"), **KINDS["dora"], dropout=0.3)
    linear = jax.tree.map(lambda leaf: leaf[0], decoder.runs[0][0].attention.query)
    x, key = jax.random.normal(jax.random.key(1), (5, 32)), jax.random.key(2)
    dropped = np.asarray(drop(x, 0.3, key), np.float64)
    w, a, b, m = (np.asarray(p[...], np.float64) for p in (
        linear.kernel, linear.adapter.a, linear.adapter.b, linear.adapter.magnitude))  # fmt: skip
    changed = w + 2.0 * a @ b
    factor = m / np.linalg.norm(changed, axis=0)
    expected = np.asarray(x, np.float64) @ w + dropped @ (factor * changed - w)
    np.testing.assert_allclose(linear(x, key), expected, atol=1e-5)


# ---- bad input


@pytest.mark.parametrize("model, settings, message", [
    ("llama", dict(targets=["q_proj"]), r"adapter.targets: 'q_proj' matches nothing; paths are such as .*query"),
    ("llama", dict(targets=["attention", "router"]), "adapter.targets: 'router' matches nothing"),
    ("llama", dict(targets=["("]), "adapter.targets: .* is no regular expression"),
    ("llama", dict(train=["nrom"]), "adapter.train: 'nrom' matches nothing; paths are such as .*norm.scale"),
    ("llama", dict(rank=17), r"adapter.rank: 17 is larger than runs.0.0.attention.key \[32, 16\] allows; at most 16"),
    ("llama", dict(targets=["query"], train=["query.kernel"]), "adapter.train: matches .*query.kernel, which carries"),
    ("llama_tied_biases", dict(targets=["lm_head"]), "'lm_head' names the head, which this model ties .* 'embed' changes both"),
    ("llama_tied_biases", dict(train=["lm_head"]), "adapter.train: 'lm_head' names the head, which this model ties"),
    ("llama", dict(name="dora", targets=["embed"]), "adapter.name: embed is an embedding, .* use lora"),
    ("llama", dict(init="pissa", targets=["embed"]), "adapter.init: embed is an embedding"),
    ("experts", dict(name="dora"), "adapter.name: runs.* is experts, whose adapters have no magnitudes"),
    ("experts", dict(dropout=0.1), "adapter.dropout: runs.* is experts, whose adapters have no dropout; set it to 0"),
    ("llama", dict(tokens=[96]), "adapter.tokens: 96 is outside of the model's vocabulary of 96"),
    ("llama", dict(tokens=[-1]), "adapter.tokens: -1 is outside"),
    ("llama", dict(tokens=[1], train=["embed"]), "adapter.tokens: rows of embed.embedding are trained beside those of 1 tokens"),
    ("llama", dict(tokens=[1], targets=["lm_head"]), "adapter.tokens: rows of lm_head are trained beside those of 1 tokens"),
])  # fmt: skip
def test_wrong_settings_name_their_key(model, settings, message):
    decoder = jax.eval_shape(partial(build, model))
    with pytest.raises(UserError, match=message):
        plan_adapters(decoder, **dict(name="lora", rank=2, alpha=4) | settings)


def test_trained_tokens_leave_the_others_alone():
    """Only rows of the chosen tokens reach embeddings and logits."""
    base = random_decoder("llama")
    decoder = moved(adapted(base, trained=False, name="lora", rank=2, alpha=4, tokens=[3, 9], targets=["query"]))
    decoder.runs = base.runs
    tokens = np.array([[1, 2, 4, 5]], np.int32)
    changed = np.asarray(jax.jit(lambda d: d(tokens))(decoder) != jax.jit(lambda d: d(tokens))(base))
    assert set(np.flatnonzero(changed.any(axis=(0, 1)))) == {3, 9}
    embeddings = {path: leaf[...] for path, leaf in named_leaves(merge(decoder))}["embed.embedding"]
    assert set(np.flatnonzero((embeddings != base.embed.embedding[...]).any(axis=1))) == {3, 9}
