"""Rows that only fill up a vocabulary take no part, and tokens that a model is given begin as the mean of the others."""

import copy
import dataclasses
import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_batches import random_batch
from tiny_models import ALL_CONFIGS, abstract, checkpoint_tensors, from_tensors, random_decoder, to_tensors, torch_model

from sft_jax.errors import UserError
from sft_jax.model import spec as spec_module
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.loss import next_token_loss
from sft_jax.model.options import Options
from sft_jax.model.sharding import make_mesh, named_leaves, shardings
from sft_jax.model.vocabulary import with_more_tokens

PADDED = {"gpt2": 97, "granite": 99}  # tokens; a tied head and one of its own
ROWS = 128


def tables(decoder) -> dict[str, np.ndarray]:
    """The parameters with a row, or a column, a token: path -> [V, D]."""
    found = {path: leaf for path, leaf in named_leaves(decoder) if "vocab" in leaf.axes}
    return {path: np.asarray(leaf[...] if leaf.axes[0] == "vocab" else leaf[...].T) for path, leaf in found.items()}


def with_filling(decoder: Decoder, value: float) -> Decoder:
    """The decoder with another number in every row that is no token."""
    count = decoder.spec.vocab_size

    def fill(leaf):
        if leaf.axes[0] == "vocab":
            return leaf.replace(leaf[...].at[count:].set(value))
        return leaf.replace(leaf[...].at[:, count:].set(value)) if leaf.axes[-1] == "vocab" else leaf

    return jax.tree.map(fill, decoder, is_leaf=lambda node: hasattr(node, "axes"))


def test_the_number_of_rows():
    assert doctest.testmod(spec_module).attempted > 0 and doctest.testmod(spec_module).failed == 0
    for size in range(1, 400):
        rows = spec_module.vocab_rows(size)
        assert size <= rows < size + 128 and rows % 32 == 0 and (rows == size) == (size % 32 == 0)


@pytest.mark.parametrize("name", PADDED)
def test_new_models_are_filled_up_with_zeros(name):
    """And their tokens are drawn as in a model of as many rows as tokens."""
    spec = spec_from_config(ALL_CONFIGS[name])
    decoder = Decoder(spec, Options(), jax.random.key(0))
    found = tables(decoder)
    assert len(found) == 2 - spec.tied_head and spec.vocab_size == PADDED[name]
    for table in found.values():
        assert table.shape == (ROWS, spec.hidden_size)
        assert not table[spec.vocab_size :].any() and table[: spec.vocab_size].all()


@pytest.mark.parametrize("name", PADDED)
def test_what_fills_up_rows_has_no_influence_and_no_gradient(name):
    """Logits, loss with all its terms, and gradients are the same bits whatever stands there."""
    batch = random_batch(2, 24, vocab=PADDED[name])
    forward = jax.jit(lambda decoder, tokens: decoder(tokens))
    loss = lambda decoder: next_token_loss(decoder, batch, z_loss=0.1, label_smoothing=0.2).total  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(loss))
    results = []
    for value in (0.0, 50.0):
        decoder = with_filling(random_decoder(name), value)
        logits = forward(decoder, batch.tokens)
        assert logits.shape == (2, 24, PADDED[name])
        total, gradients = gradient(decoder)
        for table in tables(gradients).values():
            assert not table[PADDED[name] :].any() and table[: PADDED[name]].any()
        results.append((logits, total, *jax.tree.leaves(gradients)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_id_that_is_no_token_is_not_hidden():
    decoder = random_decoder("gpt2")
    logits = np.asarray(decoder(jnp.array([[3, 97, 5], [3, 96, 5], [3, 128, 5]])))
    assert np.isnan(logits[0, 1:]).all() and np.isnan(logits[2, 1:]).all() and np.isfinite(logits[1]).all()


def enlarged(decoder: Decoder, size: int, mesh=None) -> Decoder:
    """The decoder, laid out over a mesh, with `size` tokens."""
    mesh = mesh or make_mesh(1, 1, 1, jax.devices()[:1])
    larger = with_more_tokens(jax.device_put(decoder, shardings(decoder, mesh)), size)
    drawn = Decoder(dataclasses.replace(decoder.spec, vocab_size=size), decoder.options, jax.random.key(0))
    if hasattr(decoder, "source"):
        drawn.source = decoder.source
    assert jax.tree.structure(larger) == jax.tree.structure(jax.tree.map(lambda leaf: leaf, drawn))
    assert jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, larger)) == jax.tree.leaves(shardings(drawn, mesh))
    return larger


@pytest.mark.parametrize("name, size", [("gpt2", 98), ("gpt2", 160), ("granite", 200), ("llama", 97), ("gemma2", 128)])
def test_new_tokens_begin_as_the_mean(name, size):
    """Into rows that are there already and beyond them; the rows of old tokens and all else keep their bits."""
    decoder = random_decoder(name)
    count = decoder.spec.vocab_size
    larger = enlarged(decoder, size)
    assert larger.spec.vocab_size == size
    for path, before in tables(decoder).items():
        after = tables(larger)[path]
        assert after.shape == (spec_module.vocab_rows(size), decoder.spec.hidden_size)
        np.testing.assert_array_equal(after[:count], before[:count])
        mean = before[:count].astype(np.float64).mean(axis=0)
        np.testing.assert_array_equal(after[count:size], np.broadcast_to(mean.astype(np.float32), (size - count, len(mean))))
        assert not after[size:].any()
    for (path, before), (_, after) in zip(named_leaves(decoder), named_leaves(larger), strict=True):
        if "vocab" not in before.axes:
            np.testing.assert_array_equal(before[...], after[...], err_msg=path)


def test_rows_are_left_out_where_fewer_hold_more_tokens():
    """33 tokens are held in 128 rows, 64 in 64."""
    spec = dataclasses.replace(spec_from_config(ALL_CONFIGS["granite"]), vocab_size=33)
    decoder = Decoder(spec, Options(), jax.random.key(1))
    for path, after in tables(enlarged(decoder, 64)).items():
        before = tables(decoder)[path]
        assert before.shape[0] == 128 and after.shape[0] == 64
        np.testing.assert_array_equal(after[:33], before[:33])
        assert after[33:].all()


def test_new_tokens_have_the_same_bits_on_every_mesh():
    """Numbers of very different sizes, whose sum in float32 would depend on the order."""
    rng = np.random.default_rng(0)
    scale = lambda leaf: leaf * np.exp(rng.normal(scale=4.0, size=leaf.shape)).astype(np.float32)  # noqa: E731
    decoder = jax.tree.map(scale, random_decoder("granite"))
    expected = tables(enlarged(decoder, 130))
    for sizes in ((1, 4, 2), (2, 2, 2), (1, 8, 1)):
        for path, table in tables(enlarged(decoder, 130, make_mesh(*sizes))).items():
            assert table.tobytes() == expected[path].tobytes(), path
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder)
    for path, table in tables(enlarged(half, 130)).items():
        mean = tables(half)[path][:99].astype(np.float64).mean(axis=0)
        np.testing.assert_array_equal(table[99:130], np.broadcast_to(mean.astype(jnp.bfloat16), (31, len(mean))))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_mean_of_numbers_of_any_size(size):
    decoder = jax.tree.map(lambda leaf: leaf * np.float32(size), random_decoder("gpt2"))
    ((_, before),) = tables(decoder).items()
    ((_, after),) = tables(enlarged(decoder, 98)).items()
    np.testing.assert_array_equal(after[97], before[:97].astype(np.float64).mean(axis=0).astype(np.float32))


def test_a_table_that_is_not_finite_is_named():
    decoder = random_decoder("gpt2")
    embedding = decoder.embed.embedding
    broken = jax.tree.map(lambda leaf: leaf.at[3, 4].set(jnp.nan) if leaf.shape == embedding.shape else leaf, decoder)
    with pytest.raises(UserError, match="embed.embedding: holds numbers that are not finite"):
        enlarged(broken, 98)


@pytest.mark.parametrize("name", ["gpt2", "granite"])
def test_transformers_gives_a_model_the_same_tokens(name):
    """But for its noise, 3e-5 of the spread of the numbers, which moves logits by less than a thousandth of theirs."""
    torch = pytest.importorskip("torch")
    theirs = copy.deepcopy(torch_model(name))
    before = from_tensors(abstract(name), checkpoint_tensors(theirs), ALL_CONFIGS[name])
    torch.manual_seed(0)
    theirs.resize_token_embeddings(PADDED[name] + 5, mean_resizing=True)
    ours = enlarged(before, PADDED[name] + 5)
    config = {**ALL_CONFIGS[name], "vocab_size": PADDED[name] + 5}
    found = to_tensors(ours, ours, config)
    for tensor, expected in checkpoint_tensors(theirs).items():
        np.testing.assert_allclose(found[tensor], expected, atol=2e-4 * expected.std(), err_msg=tensor)
    tokens = np.random.default_rng(1).integers(0, PADDED[name] + 5, (2, 20)).astype(np.int32)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours(tokens), logits, atol=2e-3)
    assert json.loads(theirs.config.to_json_string())["vocab_size"] == logits.shape[-1]
