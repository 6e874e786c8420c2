"""Every part of the decoder against transformers with the same weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, FAMILY_CONFIGS, packed_rows, to_tensors, torch_model, twin

from sft_jax.model.attention import KERNELS
from sft_jax.model.layers import ACTIVATIONS
from sft_jax.model.options import Options
from sft_jax.model.rope import apply_rope, rope_table
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
    [(name, kernel) for name in CONFIGS for kernel in KERNELS if kernel == "reference" or name in FAMILY_CONFIGS],
)
def test_logits(name, kernel, tokens):
    with torch.no_grad():
        expected = torch_model(name)(to_torch(tokens).long()).logits.numpy()
    assert np.abs(expected).max() > 0.5
    logits = jax.jit(lambda d, t: d(t))(twin(name, Options(attention=kernel)), tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama_tied_biases", "gemma2", "gemma3"])
def test_loss_and_gradients(name, tokens):
    theirs, ours = torch_model(name), twin(name)

    def loss(decoder):
        log_probs = jax.nn.log_softmax(decoder(tokens[:, :-1]))
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(ours)
    theirs.zero_grad()
    expected = theirs(to_torch(tokens).long(), labels=to_torch(tokens).long()).loss
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    ours_by_name = to_tensors(ours, gradients)
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


def test_norms_attention_and_blocks(pair):
    """Layer by layer on the same input, so that one wrong part is named."""
    theirs, ours = pair
    x = np.random.default_rng(3).normal(size=(2, LENGTH, 32)).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    ones = np.ones_like(positions)
    tables = ours.rope_tables(positions)
    for number, layer in enumerate(ours.spec.layers):
        block, their_block = block_of(ours, number), theirs.model.layers[number]
        mask = ours.mask(layer, positions, ones, positions, ones, aligned=True)
        bias = to_torch(np.where(np.asarray(mask.visible())[:, None], 0.0, -1e30).astype(np.float32))
        rotary = theirs.model.rotary_emb
        args = (to_torch(x), to_torch(positions).long())
        kinds = getattr(theirs.config, "layer_types", None)
        per_kind = "gemma3" in theirs.config.model_type
        angles = rotary(*args, kinds[number]) if per_kind else rotary(*args)
        kwargs = dict(position_embeddings=angles, attention_mask=bias)
        with torch.no_grad():
            norm = their_block.input_layernorm(to_torch(x)).numpy()
            mixed = their_block.self_attn(to_torch(x), **kwargs)[0].numpy()
            mlp = their_block.mlp(to_torch(x)).numpy()
            whole = their_block(to_torch(x), **kwargs)
            whole = (whole[0] if isinstance(whole, tuple) else whole).numpy()
        q, k, v = block.attention.project(x, tables[layer.rope])
        np.testing.assert_allclose(block.attention_norm(x), norm, atol=1e-5, err_msg=f"norm of layer {number}")
        np.testing.assert_allclose(block.attention.mix(q, k, v, mask), mixed, atol=1e-4, err_msg=f"attention {number}")
        np.testing.assert_allclose(block.mlp(x), mlp, atol=1e-4, err_msg=f"mlp of layer {number}")
        np.testing.assert_allclose(block(x, tables[layer.rope], mask), whole, atol=1e-4, err_msg=f"block {number}")


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
        table = rope_table(layer.rope, ours.spec.head_size, positions)
        for ours_part, their_part in zip(table, (cos, sin), strict=True):
            their_half = their_part[..., : ours.spec.head_size // 2].numpy()  # the other half repeats it
            np.testing.assert_allclose(ours_part[:, :, 0], their_half, atol=2e-5)
        rotated = modeling.apply_rotary_pos_emb(to_torch(x), to_torch(x), cos, sin, unsqueeze_dim=2)[0].numpy()
        np.testing.assert_allclose(apply_rope(x, table), rotated, atol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    from transformers.activations import ACT2FN

    x = np.linspace(-8, 8, 401, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), ACT2FN[name](to_torch(x)).numpy(), atol=2e-6)
