"""Isolation: changing document A leaves document B's logits bit-equal in the same packed row."""

import jax
import numpy as np
import pytest
from attention_kernels import ANYWHERE
from slow_values import slow
from tiny_models import ALL_CONFIGS, KINDS, packed_rows, random_decoder

from sft_jax.model.families import FAMILIES
from sft_jax.model.isolation import isolation_breaches
from sft_jax.model.options import Options

QUICK = ("llama", "gemma3", "gpt2", "gpt_oss", "deepseek_v3")
LENGTH = 200  # more than one block of the blocked kernel
TOKENS, POSITIONS, SEGMENTS = packed_rows(np.random.default_rng(0), rows=2, length=LENGTH)
FORWARD = jax.jit(lambda decoder, *batch: decoder(*batch))


def test_every_family_is_covered():
    assert {config["architectures"][0] for config in ALL_CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    "name, kernel",
    [
        *((name, "blocked") for name in QUICK),
        *slow(*((name, "blocked") for name in KINDS if name not in QUICK)),
        *slow(*((name, "blocked") for name in ALL_CONFIGS if name not in KINDS)),
        *slow(*((name, kernel) for name in KINDS for kernel in ANYWHERE if kernel != "blocked")),
    ],
)
def test_documents_of_a_row_are_isolated(name, kernel):
    decoder = random_decoder(name, Options(attention=kernel))
    assert isolation_breaches(lambda t: FORWARD(decoder, t, POSITIONS, SEGMENTS), TOKENS, SEGMENTS, 96) == []


def test_isolation_in_bfloat16():
    decoder = random_decoder("gemma2", Options(attention="blocked", compute_dtype="bfloat16"))
    assert isolation_breaches(lambda t: FORWARD(decoder, t, POSITIONS, SEGMENTS), TOKENS, SEGMENTS, 96) == []


def test_a_row_without_segments_is_caught():
    """The check sees a model that lets documents of a row see each other."""
    decoder = random_decoder("llama", Options(attention="reference"))
    forward = lambda t: FORWARD(decoder, t, POSITIONS, np.ones_like(SEGMENTS))  # noqa: E731
    breaches = isolation_breaches(forward, TOKENS, SEGMENTS, 96)
    assert {row for row, _, _ in breaches} == {0, 1}


def test_a_model_that_ignores_its_input_is_caught():
    with pytest.raises(ValueError, match="segment 1"):
        isolation_breaches(lambda t: np.zeros((*t.shape, 96)), TOKENS, SEGMENTS, 96)
