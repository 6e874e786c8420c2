"""Trained checkpoints from outside: per-token losses against an independent float64 implementation."""

import json

import jax
import numpy as np
import pytest

from sft_jax.hf.load import load_decoder
from sft_jax.model.attention import KERNELS
from sft_jax.model.options import Options


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["stories260k", "llama2xs"])
def test_per_token_losses(assets, name, kernel):
    """All texts of the reference file in one call, a row each, padded with segment 0."""
    reference = json.loads((assets / "reference" / f"{name}_nll.json").read_text())["records"]
    decoder = load_decoder(assets / "models" / name, Options(attention=kernel))
    length = max(len(record["ids"]) for record in reference)
    tokens, segments = np.zeros((2, len(reference), length), np.int32)
    for row, record in enumerate(reference):
        tokens[row, : len(record["ids"])] = record["ids"]
        segments[row, : len(record["ids"])] = 1
    log_probs = np.asarray(jax.jit(lambda d, *b: jax.nn.log_softmax(d(*b)))(decoder, tokens, None, segments))
    for row, record in enumerate(reference):
        ids = np.asarray(record["ids"])
        losses = -log_probs[row, np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(losses, record["nll"][-len(losses) :], atol=1e-4, err_msg=record["text"])
        assert abs(losses.mean() - record["mean_nll"]) < 1e-4
