"""Every part of the decoder against transformers with the same weights, float32."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from attention_kernels import ANYWHERE
from random_batches import random_batch
from slow_values import slow
from tiny_models import CONFIGS, FAMILY_CONFIGS, packed_rows, to_tensors, torch_model, twin

from sft_jax.model.block import Block
from sft_jax.model.cross_entropy import chunk_rows
from sft_jax.model.loss import next_token_loss
from sft_jax.model.mask import MaskSpec
from sft_jax.model.mlp import ACTIVATIONS
from sft_jax.model.options import Options
from sft_jax.model.rope import RopeTable, apply_rope, rope_table
from sft_jax.model.runs import layer_places

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

LENGTH = 48  # past the windows (8) and past the original length of the scaled ropes (16)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    return torch_model(request.param), twin(request.param)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 96, (2, LENGTH)).astype(np.int32)


def block_of(decoder, layer: int):
    place = layer_places(decoder.spec)[layer]
    return jax.tree.map(lambda x: x[place.index], decoder.runs[place.run][place.place])


def to_torch(x):
    return torch.tensor(np.asarray(x))


@pytest.mark.parametrize(
    "name, kernel",
    [(name, kernel) for name in CONFIGS for kernel in ANYWHERE if kernel == "reference" or name in FAMILY_CONFIGS],
)
def test_logits(name, kernel, tokens):
    with torch.no_grad():
        expected = torch_model(name)(to_torch(tokens).long()).logits.numpy()
    assert np.abs(expected).max() > 0.5
    logits = jax.jit(lambda d, t: d(t))(twin(name, Options(attention=kernel)), tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "llama_tied_biases", *slow("llama", "mistral", "gemma2", "llama3_rope")])
def test_loss_and_gradient(name):
    """The trainer's own loss on packed rows of several blocks and chunks: theirs is of each document alone.

    Tokens are above 0, because Gemma's embedding in transformers gives no gradient to token 0 (padding_idx).
    """
    batch = random_batch(3, 200, seed=5)
    batch = batch._replace(tokens=np.maximum(batch.tokens, 1), targets=np.maximum(batch.targets, 1))
    supervised = int((batch.weights != 0).sum())
    assert supervised > chunk_rows(batch.tokens.size, 96), "one chunk only"
    theirs, ours = torch_model(name), twin(name, Options(attention="blocked"))
    total = lambda decoder: (loss := next_token_loss(decoder, batch)).total / loss.weight  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(total))(ours)

    theirs.zero_grad()
    expected = 0.0
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            tokens, targets, weights = (to_torch(x[row, batch.segments[row] == segment]) for x in batch[:3])
            nll = torch.nn.functional.cross_entropy(theirs(tokens[None].long()).logits[0], targets.long(), reduction="none")
            expected = expected + (weights * nll).sum() / batch.weights.sum().item()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    ours_by_name = to_tensors(ours, gradient, CONFIGS[name])
    named = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert ours_by_name.keys() == named.keys()
    for name, gradient in named.items():
        error = np.linalg.norm(ours_by_name[name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-3, name


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_packed_rows_equal_documents_apart(name):
    """Each document of a packed row has the logits that it has in transformers alone."""
    theirs, ours = torch_model(name), twin(name, Options(attention="blocked"))
    tokens, positions, segments = packed_rows(np.random.default_rng(2), rows=2, length=LENGTH)
    logits = np.asarray(jax.jit(lambda d, *b: d(*b))(ours, tokens, positions, segments))
    assert np.isfinite(logits).all()
    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            here = segments[row] == segment
            with torch.no_grad():
                expected = theirs(to_torch(tokens[row, here][None]).long()).logits[0].numpy()
            np.testing.assert_allclose(logits[row, here], expected, atol=1e-4, rtol=0)


class Layer(NamedTuple):
    """One layer here and there, with the same input and the same rope and mask."""

    ours: Block
    theirs: Any
    table: RopeTable
    mask: MaskSpec
    arguments: dict[str, Any]  # of their attention and block


X = np.random.default_rng(3).normal(size=(2, LENGTH, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def layers(pair) -> list[Layer]:
    theirs, ours = pair
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    ones = np.ones_like(positions)
    tables = ours.rope_tables(positions)
    found = []
    for number, layer in enumerate(ours.spec.layers):
        mask = ours.mask(layer, positions, ones, positions, ones, aligned=True)
        bias = to_torch(np.where(np.asarray(mask.visible())[:, None], 0.0, -1e30).astype(np.float32))
        kinds = [theirs.config.layer_types[number]] if "gemma3" in theirs.config.model_type else []
        angles = theirs.model.rotary_emb(to_torch(X), to_torch(positions).long(), *kinds)
        arguments = dict(position_embeddings=angles, attention_mask=bias)
        found.append(Layer(block_of(ours, number), theirs.model.layers[number], tables[layer.rope], mask, arguments))
    return found


def compare(ours, theirs, what: str, atol: float) -> None:
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=atol, err_msg=what)


def test_norms(pair, layers):
    """Every RMSNorm of the model, on inputs of very different sizes."""
    theirs, ours = pair
    x = X * np.geomspace(1e-3, 30, LENGTH, dtype=np.float32)[:, None]
    compare(ours.final_norm(x), theirs.model.norm(to_torch(x)), "final norm", 1e-5)
    after_attention = "post_attention_layernorm"  # of Gemma this is the norm of what attention adds
    for number, (block, their_block, *_) in enumerate(layers):
        names = {"attention_norm": "input_layernorm", "mlp_norm": after_attention}
        if ours.spec.post_norms:
            names |= {"mlp_norm": "pre_feedforward_layernorm", "post_attention_norm": after_attention,
                      "post_mlp_norm": "post_feedforward_layernorm"}  # fmt: skip
        for name, their_name in names.items():
            found, expected = getattr(block, name)(x), getattr(their_block, their_name)(to_torch(x))
            compare(found, expected, f"{name} of layer {number}", 1e-5)
        if ours.spec.query_key_norm:
            heads = x.reshape(2, LENGTH, -1, ours.spec.head_size)
            for name, their_name in {"query_norm": "q_norm", "key_norm": "k_norm"}.items():
                found = getattr(block.attention, name)(heads)
                expected = getattr(their_block.self_attn, their_name)(to_torch(heads))
                compare(found, expected, f"{name} of layer {number}", 1e-5)


def test_attention(layers):
    for number, (block, their_block, table, mask, arguments) in enumerate(layers):
        mixed = block.attention.mix(*block.attention.project(X, table), mask)
        compare(mixed, their_block.self_attn(to_torch(X), **arguments), f"attention of layer {number}", 1e-4)


def test_mlp(layers):
    for number, layer in enumerate(layers):
        compare(layer.ours.mlp(X), layer.theirs.mlp(to_torch(X)), f"mlp of layer {number}", 1e-4)


def test_blocks(layers):
    for number, (block, their_block, table, mask, arguments) in enumerate(layers):
        compare(block(X, table, mask)[0], their_block(to_torch(X), **arguments), f"layer {number}", 1e-4)


def test_rope(pair):
    """cos and sin of every kind of rope, to eight times the original length."""
    theirs, ours = pair
    positions = np.arange(128, dtype=np.int32)[None]
    rotary = theirs.model.rotary_emb
    probe = torch.zeros(1, 1, dtype=torch.float32)
    kinds = getattr(theirs.config, "layer_types", None) if "gemma3" in theirs.config.model_type else None
    x = np.random.default_rng(4).normal(size=(1, 128, 2, ours.spec.head_size)).astype(np.float32)
    modeling = __import__(type(theirs).__module__, fromlist=["apply_rotary_pos_emb"])
    for number, layer in enumerate(ours.spec.layers):
        args = (probe, to_torch(positions).long())
        cos, sin = rotary(*args, kinds[number]) if kinds else rotary(*args)
        table = rope_table(layer.rope, positions)
        for ours_part, their_part in zip(table[:2], (cos, sin), strict=True):
            their_half = their_part[..., : ours.spec.head_size // 2].numpy()  # the other half repeats it
            np.testing.assert_allclose(ours_part[:, :, 0], their_half, atol=2e-5)
        rotated = modeling.apply_rotary_pos_emb(to_torch(x), to_torch(x), cos, sin, unsqueeze_dim=2)[0].numpy()
        np.testing.assert_allclose(apply_rope(x, table, layer.rope.interleaved), rotated, atol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    from transformers.activations import ACT2FN

    x = np.linspace(-8, 8, 401, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), ACT2FN[name](to_torch(x)).numpy(), atol=2e-6)
