"""Projected gradients against whole ones of each document alone, and unpacked batches against the stream."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_models import random_decoder

from sft_jax.batch import Batch
from sft_jax.influence.gradients import make_gradients
from sft_jax.model.loss import next_token_loss

ROWS, LENGTH = 8, 12


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60, (ROWS, LENGTH + 1)).astype(np.int32)
    ids[1, :9], ids[1, 9:] = ids[0, :9], ids[0, 9:][::-1]  # two that are alike
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    weights = (rng.random((ROWS, LENGTH)) > 0.3).astype(np.float32)
    weights[5] = 0
    return Batch(ids[:, :-1], ids[:, 1:], weights, np.ones_like(positions), positions, np.zeros((ROWS, 1), np.int32))


def whole_gradients(decoder, batch) -> np.ndarray:
    """Of the kernels of all projections of the blocks, one row after the other: [ROWS, parameters]."""
    graphdef, state = nnx.split(decoder)
    gradient = jax.jit(jax.grad(lambda state, row: next_token_loss(nnx.merge(graphdef, state), row).total))
    rows = []
    for row in range(ROWS):
        found = gradient(state, jax.tree.map(lambda values, row=row: values[row : row + 1], batch))
        rows.append(np.concatenate([np.ravel(v) for path, v in nnx.to_pure_dict(found)["runs"].items() for v in _kernels(v)]))
    return np.stack(rows).astype(np.float64)


def _kernels(tree: dict, name=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _kernels(value, (*name, key))
        elif key == "kernel":
            yield value


def test_inner_products_are_those_of_whole_gradients(batch):
    """Without narrowing and with a rank that is the size of the inputs they are nearly exact; narrower, they scatter around."""
    decoder = random_decoder("llama")
    expected = whole_gradients(decoder, batch)
    expected = expected @ expected.T
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    scale[5], scale[:, 5] = 1, 1
    errors = []
    for seed in range(6):
        projected = np.asarray(make_gradients(decoder, seed, rank=16, width=16)(batch), np.float64)
        errors.append((projected @ projected.T - expected) / scale)
        assert np.abs(errors[-1]).max() < 0.35
    assert np.abs(np.mean(errors, axis=0)).max() < 0.15, "no bias"
    assert not projected[5].any(), "nothing is supervised"


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(batch):
    decoder = random_decoder("llama")
    first, again, other = (np.asarray(make_gradients(decoder, seed, rank=16, width=16)(batch)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1 * np.abs(first).max()
