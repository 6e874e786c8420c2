"""Noise on embeddings: its size for each document, and where it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import packed_rows, random_decoder

from sft_jax.model.neftune import document_lengths, with_neftune
from sft_jax.model.options import Options

ROWS, LENGTH, SIZE = 4, 24, 32
KEY = jax.random.key(7)
_, POSITIONS, SEGMENTS = packed_rows(np.random.default_rng(0), ROWS, LENGTH)


def lengths(segments: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(row, minlength=row.max() + 1)[row] for row in segments])


@pytest.mark.parametrize("segments", [SEGMENTS, np.ones((2, 5), np.int32), np.arange(1, 9, dtype=np.int32)[None], np.zeros((1, 3), np.int32)])
def test_the_length_of_the_document_of_each_token(segments):
    np.testing.assert_array_equal(document_lengths(jnp.asarray(segments)), lengths(segments))


def test_noise_is_uniform_within_the_bound_of_its_document():
    shape = (*SEGMENTS.shape, 4096)
    noise = np.asarray(with_neftune(jnp.zeros(shape), SEGMENTS, KEY, 5.0), np.float64)
    assert (SEGMENTS == 0).any() and not noise[SEGMENTS == 0].any()
    bound = 5.0 / np.sqrt(lengths(SEGMENTS) * 4096.0)
    share = (noise / bound[..., None])[SEGMENTS > 0]  # of the bound, which documents of different lengths have their own of
    assert len(set(bound[SEGMENTS > 0])) > 3
    deviation = 4 / np.sqrt(share.shape[1])  # of means over one token
    assert np.abs(share).max() <= 1 + 1e-6 and (np.abs(share).max(axis=1) > 0.99).all()
    np.testing.assert_allclose(share.mean(axis=1), 0, atol=deviation)
    np.testing.assert_allclose((share**2).mean(axis=1), 1 / 3, atol=deviation)
    other = np.asarray(with_neftune(jnp.zeros(shape), SEGMENTS, jax.random.key(8), 5.0))
    assert abs(np.corrcoef(noise[SEGMENTS > 0].ravel(), other[SEGMENTS > 0].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_noise_is_added_to_the_rows_of_the_table(name):
    """Every position has a token of its own, so a table with the noise in it must give the same states; gemma scales it."""
    decoder = random_decoder(name, Options(neftune=5.0))
    size = decoder.spec.hidden_size
    tokens = np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH)
    noise = with_neftune(jnp.zeros((ROWS, LENGTH, size)), SEGMENTS, jax.random.fold_in(KEY, 0), 5.0).reshape(-1, size)
    graphdef, state = nnx.split(random_decoder(name))
    table = state["embed"]["embedding"]
    state["embed"]["embedding"] = table.replace(table[...].at[: len(noise)].add(noise))
    hidden = jax.jit(lambda decoder, key: decoder.hidden(tokens, POSITIONS, SEGMENTS, key))
    expected, noisy, quiet = hidden(nnx.merge(graphdef, state), None), hidden(decoder, KEY), hidden(decoder, None)
    np.testing.assert_allclose(noisy, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(quiet, hidden(random_decoder(name), None))
    np.testing.assert_array_equal(quiet, hidden(random_decoder(name), KEY))  # nothing is random where no option is
    assert (noisy != quiet)[SEGMENTS > 0].any(axis=-1).all()


def test_noise_is_added_in_float32():
    x = jnp.ones((ROWS, LENGTH, SIZE), jnp.bfloat16)
    y = with_neftune(x, SEGMENTS, KEY, 0.01)
    assert y.dtype == jnp.bfloat16
    exact = with_neftune(x.astype(jnp.float32), SEGMENTS, KEY, 0.01)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
