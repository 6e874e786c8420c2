"""Documents in one row do not know of each other: packed == unpacked, and a change in one leaves others bit-equal."""

from itertools import product

import jax
import numpy as np
import pytest
from attention_kernels import ANYWHERE
from random_batches import random_batch
from slow_values import slow
from tiny_models import KINDS, random_decoder

from sft_jax.model.decoder import Decoder
from sft_jax.model.options import Options
from sft_jax.training import contracts


QUICK = ("mistral", "blocked")


@pytest.mark.parametrize("name, kernel", [QUICK, *slow(*sorted({*product(KINDS, ANYWHERE)} - {QUICK}))])
def test_packed_equals_unpacked(name, kernel):
    """Documents begin and end anywhere in the blocks of the kernel, and windows within one."""
    result = contracts.packing(random_decoder(name, Options(attention=kernel)), random_batch(2, 200, seed=1))
    assert result.holds, result


def test_documents_are_isolated():
    result = contracts.isolation(random_decoder("gemma2"), random_batch(4, 32, seed=2))
    assert result.holds, result


class Leaky(Decoder):
    """A decoder whose documents see those before them in the row."""

    def hidden(self, tokens, positions, segments, key=None):
        return super().hidden(tokens, positions, jax.numpy.minimum(segments, 1), key)


def leaky() -> Decoder:
    decoder = random_decoder("llama")
    other = jax.eval_shape(lambda: Leaky(decoder.spec, decoder.options, jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(decoder))


def test_a_leak_breaks_isolation():
    assert not contracts.isolation(leaky(), random_batch(4, 32, seed=2)).holds


def test_a_leak_breaks_packing():
    assert not contracts.packing(leaky(), random_batch(4, 32, seed=2)).holds


def test_unpack_gives_every_document_its_own_row():
    batch = random_batch(4, 32, seed=4)
    alone, (rows, columns) = contracts.unpack(batch)
    assert len(alone.tokens) == sum(int(segments.max()) for segments in batch.segments)
    on = alone.segments > 0
    assert on.sum() == (batch.segments > 0).sum() and not alone.positions[:, 0].any()
    for name in ("tokens", "targets", "weights", "positions"):
        np.testing.assert_array_equal(getattr(alone, name)[on], getattr(batch, name)[rows[on], columns[on]])
    assert len({tuple(place) for place in zip(rows[on].tolist(), columns[on].tolist())}) == on.sum()
    assert sorted(alone.examples[:, 0]) == sorted(batch.examples[batch.examples >= 0])
