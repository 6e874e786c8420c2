"""Rounded kernels against numpy, and what is trained with them against a decoder that has the rounded numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batches import random_batch
from rounded_kernels import by_hand, numpy_rounded
from slow_values import slow
from tiny_models import ALL_CONFIGS, packed_rows, random_decoder, randomized

from sft_jax.model.adapters import block_projections
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.loss import next_token_loss
from sft_jax.model.options import Options
from sft_jax.model.qat import ROUNDINGS, rounded
from sft_jax.model.sharding import constrain_fn, make_mesh, named_leaves
from sft_jax.training import contracts

pytest.importorskip("qwix")

BATCH = packed_rows(np.random.default_rng(0), 2, 24)


def decoder_with(name: str, options: Options = Options()) -> Decoder:
    config = ALL_CONFIGS[name] | dict(intermediate_size=64)
    return randomized(jax.eval_shape(lambda: Decoder(spec_from_config(config), options, jax.random.key(0))))


def largest(x) -> float:
    return float(jnp.max(jnp.abs(x)))


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_numbers_and_the_gradient_past_them(name, dtype):
    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 5), scale=0.1), dtype)
    kernels = kernels.at[1, :, 2].set(0.0)
    found = jax.jit(lambda x: rounded(x, name))(kernels)
    assert found.dtype == jnp.float32
    for ours, kernel in zip(found, np.asarray(kernels.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(ours, numpy_rounded(kernel, name), atol=1e-7)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=kernels.shape), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(rounded(x, name) * weights))(kernels.astype(jnp.float32))
    np.testing.assert_array_equal(gradient, weights)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_rounded_are_the_numbers_of_the_export(name, dtype):
    """Those of 16 bits, also inside compiled code, with the gradient of what is held."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(64, 40)), jnp.float32)
    served = np.asarray(kernel.astype(dtype).astype(jnp.float32))
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(rounded(x, name, dtype) ** 3)))(kernel)
    np.testing.assert_allclose(jax.jit(lambda x: rounded(x, name, dtype))(kernel), numpy_rounded(served, name), atol=1e-6)
    np.testing.assert_allclose(gradient, 3 * numpy_rounded(served, name) ** 2, rtol=1e-5)
    assert np.abs(numpy_rounded(served, name) - numpy_rounded(np.asarray(kernel), name)).max() > 1e-3


@pytest.mark.parametrize("model", ["llama", "qwen2_moe"])
def test_rounded_kernels_are_not_kept_for_the_backward_pass(model):
    """They would be a second copy of all layers."""
    batch, sizes = random_batch(2, 8), {}
    for qat in ("", "int8"):
        decoder = random_decoder(model, Options(qat=qat))
        _, residuals = jax.eval_shape(lambda d: jax.vjp(lambda d: next_token_loss(d, batch).total, d), decoder)
        sizes[qat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    kernels = sum(module.kernel[...].size for _, module in block_projections(random_decoder(model)))
    assert sizes["int8"] < sizes[""] + 0.1 * kernels


@pytest.mark.parametrize("name", ROUNDINGS)
def test_as_servers_round(name):
    """By the formulas of compressed-tensors and torchao; only what is half-way there, the largest of a group, may differ."""
    kernel = np.random.default_rng(2).normal(size=(64, 40)).astype(np.float32)
    groups = kernel.reshape(-1, ROUNDINGS[name].group or 64, 40)
    bits = int(name.removeprefix("int"))
    scales = np.abs(groups).max(axis=1, keepdims=True) / ((2**bits - 1) / 2)
    served = np.clip(np.rint(groups / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    ours = np.rint(np.asarray(rounded(kernel, name)).reshape(groups.shape) / scales)
    is_largest = np.abs(groups) == np.abs(groups).max(axis=1, keepdims=True)
    assert np.array_equal(ours[~is_largest], served[~is_largest])
    assert np.abs(ours - served).max() <= 1 and is_largest.sum() == groups.shape[0] * 40


@pytest.mark.parametrize("model, name", [("llama", "int4"), *slow(("llama", "int8"), ("qwen2_moe", "int8"), ("gpt_oss", "int8"), ("deepseek_v3", "int8"))])
def test_blocks_are_rounded_and_nothing_else(model, name):
    """Not the head, the embedding, norms, biases, the router and the gate of a shared MLP; gradients pass as they are."""
    make = decoder_with if name == "int4" else random_decoder
    plain, rounding = make(model), make(model, Options(qat=name))
    expected = by_hand(plain, name)
    batch = random_batch(4, 24)
    loss = jax.jit(jax.value_and_grad(lambda decoder: next_token_loss(decoder, batch).total))
    (ours, gradient), (theirs, reference), (unrounded, _) = loss(rounding), loss(expected), loss(plain)
    np.testing.assert_allclose(ours, theirs, rtol=3e-6)  # sums in another order, by version of JAX
    assert abs(ours - unrounded) > 1e-5 * unrounded
    for (path, x), (_, y) in zip(named_leaves(gradient), named_leaves(reference), strict=True):
        assert largest(x[...] - y[...]) <= 1e-4 * max(largest(y[...]), 1e-6), path


def test_decoding_rounds_as_well():
    decoder = decoder_with("llama", Options(qat="int4"))
    tokens, positions, _ = (x[:, :8] for x in BATCH)
    hidden, _ = jax.jit(lambda d: d.extend(tokens, positions, None, d.init_cache(2, 8)))(decoder)
    expected = jax.jit(lambda d: d.hidden(tokens, positions, None))(by_hand(decoder_with("llama"), "int4"))
    assert largest(hidden - expected) <= 1e-4 * largest(expected)


def test_every_layout_equals_one_device():
    def decoder(mesh):
        return decoder_with("llama", Options(qat="int4", **({} if mesh is None else {"constrain": constrain_fn(mesh)})))

    (result,) = contracts.layout(decoder, random_batch(8, 24), {"data2_fsdp2_tensor2": make_mesh(2, 2, 2)}).values()
    assert result.holds, result


@pytest.mark.slow
def test_experts_over_tensor_have_the_scales_of_all_their_inputs():
    def decoder(mesh):
        return random_decoder("mixtral", Options(qat="int8", **({} if mesh is None else {"constrain": constrain_fn(mesh)})))

    (result,) = contracts.layout(decoder, random_batch(8, 24), {"data2_fsdp2_tensor2": make_mesh(2, 2, 2)}).values()
    assert result.holds, result
