"""Decoders whose blocks are quantised == decoders whose kernels are the dequantised numbers, on every path and layout."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import KINDS, moved
from jax.sharding import PartitionSpec as P
from quantised_numbers import REFERENCES
from random_batches import random_batch
from slow_values import slow
from tiny_models import ALL_CONFIGS, packed_rows, random_decoder, randomized

from sft_jax.errors import UserError
from sft_jax.model.adapters import block_projections, is_adapter, plan_adapters
from sft_jax.model.attach import attach, merge
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.loss import next_token_loss
from sft_jax.model.options import Options
from sft_jax.model.quant import KERNEL_FORMATS, QuantisedKernel
from sft_jax.model.quantise import quantise
from sft_jax.model.sharding import LAYOUT, abstract_mesh, constrain_fn, make_mesh, named_leaves, shardings
from sft_jax.training import contracts
from sft_jax.training.step import place_batch

# Wide enough that eight devices hold whole blocks.
WIDE = {
    "llama": dict(hidden_size=512, intermediate_size=192, head_dim=32, num_hidden_layers=2),
    "gpt_oss": dict(hidden_size=128, intermediate_size=128, head_dim=32, num_hidden_layers=4),
    "mixtral": dict(hidden_size=128, intermediate_size=96, head_dim=32, num_hidden_layers=2),  # a block and a half
}
BATCH = packed_rows(np.random.default_rng(0), 2, 24)
logits = jax.jit(lambda decoder, *batch: decoder(*batch))


@cache
def wide(name: str, options: Options = Options()) -> Decoder:
    config = ALL_CONFIGS[name] | WIDE[name]
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    return randomized(jax.eval_shape(lambda: Decoder(spec_from_config(config), options, jax.random.key(0))))


def dense(decoder: Decoder, stored_as: str) -> Decoder:
    """The decoder with the numbers in place of its kernels that numpy makes of them."""

    def rounded(kernel):
        flat = np.asarray(kernel).reshape(-1, *kernel.shape[-2:])
        return jnp.asarray(np.stack([REFERENCES[stored_as](kernel)[2] for kernel in flat]).reshape(kernel.shape))

    def replace(path, leaf):
        kept = re.search(r"router|shared_gate|^embed|^lm_head", path) or not path.endswith(".kernel")
        return leaf if kept else leaf.replace(rounded(leaf[...]))

    paths = iter([path for path, _ in named_leaves(decoder)])
    return jax.tree.map(lambda leaf: replace(next(paths), leaf), decoder, is_leaf=lambda node: hasattr(node, "get_metadata"))


def both(name: str, stored_as: str, settings: dict) -> tuple[Decoder, Decoder]:
    """With the same adapters, which do something: on quantised blocks, and on the numbers that these stand for."""
    base = random_decoder(name)
    plan = plan_adapters(base, **settings)
    decoders = (attach(decoder, plan, jax.random.key(0)) for decoder in (quantise(base, stored_as), dense(base, stored_as)))
    return tuple(map(moved, decoders))


def largest(x) -> float:
    return float(jnp.max(jnp.abs(x)))


def test_which_kernels():
    """Those of attention, MLP, experts and shared MLP; not routers, their gate, embeddings, head, norms, biases, sinks."""
    for name in ("llama_tied_biases", "qwen2_moe", "gpt_oss", "deepseek_v3"):
        decoder = random_decoder(name)
        kernels = {path for path, leaf in named_leaves(decoder) if path.endswith(".kernel") and path.startswith("runs.")}
        expected = {path for path in kernels if not path.endswith((".router.kernel", ".shared_gate.kernel"))}
        quantised = dict(named_leaves(quantise(decoder, "nf4")))
        assert {path.removesuffix(".codes") for path in quantised if path.endswith(".codes")} == expected
        for path, leaf in named_leaves(decoder):
            assert path in expected or quantised[path].get_value() is leaf.get_value(), path


@pytest.mark.parametrize("name, stored_as", [
    ("llama", "nf4"), *slow(("gpt_oss", "nf4"), ("phi3", "nf4")), ("qwen2_moe", "int8"), ("deepseek_v3", "fp8"),
])  # fmt: skip
def test_logits_are_those_of_the_dequantised_numbers(name, stored_as):
    base = random_decoder(name)
    expected = logits(dense(base, stored_as), *BATCH)
    found = logits(quantise(base, stored_as), *BATCH)
    assert largest(found - expected) <= 1e-5 * largest(expected)
    assert largest(found - logits(base, *BATCH)) > 1e-3 * largest(expected)


@pytest.mark.parametrize("name, kind, stored_as", [
    ("llama", "lora", "int8"), *slow(("gpt_oss", "lora", "nf4"), ("llama", "pissa_dora", "nf4"), ("qwen2_moe", "pissa", "fp8")),
])  # fmt: skip
def test_gradients_are_those_of_the_dequantised_numbers(name, kind, stored_as):
    """Of adapters, and of the embedding, which the gradients of all projections' inputs reach; also with dropout."""
    dropout = 0.2 if name == "llama" else 0.0
    quantised, plain = both(name, stored_as, KINDS[kind] | dict(dropout=dropout))
    batch = random_batch(4, 24)

    @jax.jit
    def loss_and_gradients(decoder):
        floats, rest = split(decoder, lambda path: is_adapter(path) or path == "embed.embedding")
        total = lambda floats: next_token_loss(rest(floats), batch, key=jax.random.key(1)).total  # noqa: E731
        return jax.value_and_grad(total)(floats)

    (loss, ours), (expected_loss, expected) = loss_and_gradients(quantised), loss_and_gradients(plain)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert ours.keys() == expected.keys() and "embed.embedding" in ours
    for path, gradient in ours.items():
        assert largest(gradient - expected[path]) <= 1e-4 * max(largest(expected[path]), 1e-6), path


def split(decoder: Decoder, chosen) -> tuple[dict, callable]:
    """The values of chosen parameters by path, and a function that puts others in their place."""
    values = {path: leaf.get_value() for path, leaf in named_leaves(decoder) if chosen(path)}

    def rest(values):
        paths = iter([path for path, _ in named_leaves(decoder)])
        replace = lambda path, leaf: leaf.replace(values[path]) if path in values else leaf  # noqa: E731
        return jax.tree.map(lambda leaf: replace(next(paths), leaf), decoder, is_leaf=lambda node: hasattr(node, "get_metadata"))

    return values, rest


@pytest.mark.parametrize("name, remat", [("llama", "full"), *slow(("llama", "none"), ("llama", "dots"), ("gpt_oss", "none"))])
def test_no_float_kernel_is_kept(name, remat):
    """Compiled, the gradient has no stack of float kernels, and of codes no further copy."""
    decoder = quantise(wide(name, Options(compute_dtype="bfloat16", remat=remat)), "nf4")
    decoder = attach(decoder, plan_adapters(decoder, name="lora", rank=2, alpha=4), jax.random.key(0))
    batch = random_batch(4, 24)

    @jax.jit
    def gradient(adapters, decoder):
        rest = split(decoder, is_adapter)[1]
        return jax.grad(lambda adapters: next_token_loss(rest(adapters), batch).total)(adapters)

    compiled = gradient.lower(split(decoder, is_adapter)[0], decoder).compile()
    kernels = [node.kernel for _, node in block_projections(decoder)]
    assert all(isinstance(kernel, QuantisedKernel) and kernel.shape[0] == 2 for kernel in kernels)
    text = compiled.as_text()
    for kernel in kernels:
        shape = ",".join(map(str, kernel.shape))
        assert not re.search(rf"(f32|bf16)\[{shape}\]", text), shape
        pairs = ",".join(map(str, kernel.codes.get_value().shape[1:]))
        assert not re.search(rf"f32\[{pairs}\]\S* get-tuple-element", text), "a loop carries tables of numbers"


@pytest.mark.slow
@pytest.mark.parametrize("name, stored_as, meshes", [
    ("llama", "nf4", [(2, 2, 2)]),  # 192 inputs of an MLP are three blocks, which no two devices can share
    *slow(("llama", "nf4", [(2, 4, 1)])), *slow(*((name, "nf4", [(2, 2, 2)]) for name in ("gpt_oss", "mixtral"))),
    *slow(*((name, form, [(1, 4, 2)]) for name, form in (("llama", "int8"), ("llama", "fp8"), ("gpt_oss", "int8")))),
])  # fmt: skip
def test_one_device_is_eight(name, stored_as, meshes):
    """Codes bit for bit; losses and gradients of adapters up to the order of sums."""

    def computed(mesh):
        base = wide(name, Options() if mesh is None else Options(constrain=constrain_fn(mesh)))
        batch = random_batch(8, 24)
        if mesh is not None:
            base, batch = jax.device_put(base, shardings(base, mesh)), place_batch(batch, mesh)
        decoder = quantise(base, stored_as)
        held = {path: np.asarray(leaf[...]) for path, leaf in named_leaves(decoder) if ".kernel." in path}
        decoder = moved(attach(decoder, plan_adapters(decoder, **KINDS["lora"]), jax.random.key(0)))

        @jax.jit
        def loss_and_gradients(decoder, batch):
            values, rest = split(decoder, is_adapter)
            return jax.value_and_grad(lambda values: next_token_loss(rest(values), batch, mesh).total)(values)

        loss, gradients = loss_and_gradients(decoder, batch)
        return held, float(loss), {path: np.asarray(value) for path, value in gradients.items()}

    held, loss, gradients = computed(None)
    for sizes in meshes:
        other_held, other_loss, others = computed(make_mesh(*sizes))
        for path, array in held.items():
            assert array.tobytes() == other_held[path].tobytes(), path
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        for path, gradient in gradients.items():
            assert largest(others[path] - gradient) <= 1e-4 * largest(gradient), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", *slow("gpt_oss")])
def test_contracts_of_training_hold(name):
    decoder = quantise(random_decoder(name), "nf4")
    for result in (
        contracts.accumulation(decoder, random_batch(8, 24), 4), contracts.packing(decoder, random_batch(4, 24)),
        contracts.isolation(decoder, random_batch(2, 24)),
    ):  # fmt: skip
        assert result.holds, result


def test_codes_travel_and_not_numbers():
    """Over fsdp the kernels are gathered as they are stored."""
    mesh = make_mesh(1, 8, 1)
    base = wide("llama", Options(constrain=constrain_fn(mesh)))
    decoder = quantise(jax.device_put(base, shardings(base, mesh)), "nf4")
    batch = place_batch(random_batch(8, 24), mesh)
    text = jax.jit(lambda d, b: next_token_loss(d, b, mesh).total).lower(decoder, batch).compile().as_text()
    gathered = re.findall(r"= (\S+)\[([\d,]+)\]\S* all-gather", text)
    bytes_each = {"u8": 1, "f32": 4, "bf16": 2, "s32": 4}
    sizes = [bytes_each[dtype] * np.prod([int(n) for n in shape.split(",")]) for dtype, shape in gathered]
    table = 4 * 96 * 512  # the head travels as numbers, and so do the states that are looked up
    kernels = [leaf.get_value() for path, leaf in named_leaves(decoder) if path.endswith((".codes", ".scales"))]
    assert {"u8"} < {dtype for dtype, _ in gathered}
    assert sum(sizes) <= 2 * table + 1.1 * sum(kernel.nbytes for kernel in kernels) / len(decoder.runs[0][0].attention_norm.scale[...])


@pytest.mark.parametrize("kind", ["lora", *slow("pissa_dora")])
def test_merged_into_the_numbers_that_adapters_were_trained_on(kind):
    """A plain decoder of the same tree as the base, in its dtype, which computes the same."""
    quantised, plain = both("llama", "nf4", KINDS[kind])
    merged = merge(quantised)
    assert jax.tree.structure(merged) == jax.tree.structure(random_decoder("llama"))
    expected = logits(quantised, *BATCH)
    assert largest(logits(merged, *BATCH) - expected) <= 1e-5 * largest(expected)
    for (path, ours), (_, theirs) in zip(named_leaves(merged), named_leaves(merge(plain)), strict=True):
        np.testing.assert_allclose(ours[...], theirs[...], atol=1e-5, err_msg=path)


def test_the_dtype_of_the_base_is_that_of_the_merged_model():
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_decoder("qwen2_moe"))
    merged = merge(quantise(base, "int8"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}
    assert merge(quantise(jax.eval_shape(lambda: base), "int8")).runs[0][0].mlp.up.kernel.get_value().dtype == jnp.bfloat16


@pytest.mark.parametrize("stored_as", KERNEL_FORMATS)
def test_an_abstract_decoder_is_quantised_without_computing(stored_as):
    mesh = abstract_mesh(1, 2, 1)
    base = wide("llama")
    describe = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    abstract = quantise(jax.tree.map(describe, base, shardings(base, mesh)), stored_as)
    concrete = quantise(base, stored_as)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for (path, x), (_, y) in zip(named_leaves(abstract), named_leaves(concrete), strict=True):
        assert isinstance(x.get_value(), jax.ShapeDtypeStruct)
        assert (x.get_value().shape, x.get_value().dtype) == (y.get_value().shape, y.get_value().dtype), path
    placed = dict(named_leaves(abstract))["runs.0.0.mlp.up.kernel.codes"].get_value().sharding
    assert placed.spec == jax.sharding.PartitionSpec(None, LAYOUT["embed"], "tensor")


def test_in_bfloat16():
    """Dequantised in float32 and rounded once: as a base whose kernels are these numbers in bfloat16."""
    options = Options(compute_dtype="bfloat16")
    base = random_decoder("llama", options)
    found, expected = logits(quantise(base, "nf4"), *BATCH), logits(dense(base, "nf4"), *BATCH)
    assert largest(found - expected) <= 1e-2 * largest(expected)
    kernel = quantise(base, "nf4").runs[0][0].mlp.up.kernel
    np.testing.assert_array_equal(kernel.astype(jnp.bfloat16), kernel.astype(jnp.float32).astype(jnp.bfloat16))


def test_where_blocks_are_cut_and_where_they_stay_whole():
    """Along "embed", which is gathered, codes are cut between any two bytes; over `tensor` only between blocks."""
    mesh, base = abstract_mesh(1, 16, 2), wide("llama")
    describe = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    abstract = jax.tree.map(describe, base, shardings(base, mesh))
    placed = {path: leaf.get_value().sharding.spec for path, leaf in named_leaves(quantise(abstract, "nf4"))}
    up, down = (f"runs.0.0.mlp.{name}.kernel" for name in ("up", "down"))  # 512 inputs in 8 blocks, and 192 in 3
    assert placed[f"{up}.codes"] == P(None, LAYOUT["embed"], "tensor") and placed[f"{up}.scales"] == P(None, None, "tensor")
    assert placed[f"{down}.codes"] == placed[f"{down}.scales"] == P(None, None, LAYOUT["embed"])
    placed = {path: leaf.get_value().sharding.spec for path, leaf in named_leaves(quantise(abstract, "int8"))}
    assert placed[f"{down}.codes"] == P(None, "tensor", LAYOUT["embed"]) and placed[f"{down}.scales"] == P(None, None, LAYOUT["embed"])


def test_stacks_are_quantised_one_layer_after_the_other():
    """A base that is a run has all its kernels in memory already, and their numbers in float32 must not come on top."""
    kernel = jax.ShapeDtypeStruct((16, 256, 128), jnp.float32)  # of others XLA makes float32 first, on the CPU
    make = lambda kernel: QuantisedKernel(kernel, "nf4", ("layers", "embed", "mlp"), {})  # noqa: E731
    memory = jax.jit(make).lower(kernel).compile().memory_analysis()
    assert memory.temp_size_in_bytes < kernel.size * 4 / 8


def test_what_is_quantised_cannot_be_trained():
    decoder = quantise(random_decoder("llama"), "nf4")
    with pytest.raises(UserError, match=r"adapter.train: runs.0.0.mlp.down.kernel is trained whole, but it is quantised \(adapter.base_dtype\)"):
        plan_adapters(decoder, name="lora", rank=2, alpha=4, targets=["query"], train=[r"down\.kernel$"])
    plan_adapters(decoder, name="lora", rank=2, alpha=4, targets=["query"], train=["norm", "embed"])
