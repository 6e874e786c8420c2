"""Checkpoints from outside: per-token losses against an independent float64 implementation, logits against recorded ones."""

import json

import jax
import numpy as np
import pytest
from attention_kernels import ANYWHERE

from sft_jax.hf.load import load_decoder
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.options import Options
from sft_jax.model.sharding import is_variable, path_name


@pytest.mark.parametrize("kernel", ANYWHERE)
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


@pytest.mark.parametrize("stored_as, added", [("nf4", 0.15), ("int8", 0.005), ("fp8", 0.06)])
@pytest.mark.parametrize("name", ["stories260k", "llama2xs"])
def test_what_a_quantised_base_loses(assets, name, stored_as, added):
    """In nats a token of the same texts, against the recorded losses of the full one; of models as tiny as these."""
    records = json.loads((assets / "reference" / f"{name}_nll.json").read_text())["records"]
    decoder = load_decoder(assets / "models" / name, Options(), stored_as=stored_as)
    forward = jax.jit(lambda d, tokens: jax.nn.log_softmax(d(tokens)))
    losses, expected = [], []
    for record in records:
        ids = np.asarray(record["ids"])
        losses += list(-np.asarray(forward(decoder, ids[None]))[0, np.arange(len(ids) - 1), ids[1:]])
        expected += record["nll"][-len(ids) + 1 :]
    assert 0 < np.mean(losses) - np.mean(expected) < added


def test_gpt2_of_another_library(assets):
    """Parameters, inputs and logits of a Hugging Face GPT-2 that axlearn recorded; no torch is needed."""
    recorded = np.load(assets / "reference" / "gpt2_causal_lm.npz")
    root = "test_against_hf_gpt2_lm/params/decoder/"
    value = lambda path: recorded[root + path]  # noqa: E731
    stack = lambda path: np.stack([value(f"transformer/layer{i}/{path}") for i in range(2)])  # noqa: E731
    heads = "self_attention/attention/i_proj/"
    parts = {
        "attention_norm.scale": stack("self_attention/norm/scale"), "attention_norm.bias": stack("self_attention/norm/bias"),
        "attention.output.kernel": stack("self_attention/attention/o_proj/weight").reshape(2, 16, 16).swapaxes(1, 2),
        "attention.output.bias": stack("self_attention/attention/o_proj/bias"),
        "mlp_norm.scale": stack("feed_forward/norm/scale"), "mlp_norm.bias": stack("feed_forward/norm/bias"),
        "mlp.up.kernel": stack("feed_forward/linear1/weight"), "mlp.up.bias": stack("feed_forward/linear1/bias"),
        "mlp.down.kernel": stack("feed_forward/linear2/weight"), "mlp.down.bias": stack("feed_forward/linear2/bias"),
    }  # fmt: skip
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.items():
        parts[f"attention.{ours}.kernel"] = stack(f"{heads}{theirs}/weight").reshape(2, 16, 16)
        parts[f"attention.{ours}.bias"] = stack(f"{heads}{theirs}/bias").reshape(2, 16)
    arrays = {f"runs.0.0.{name}": array for name, array in parts.items()} | {
        "embed.embedding": value("emb/token_emb/weight"), "embed.positions": value("emb/pos_emb/weight")[0],
        "final_norm.scale": value("output_norm/scale"), "final_norm.bias": value("output_norm/bias"),
    }  # fmt: skip
    config = {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": 24, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 11,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    decoder = jax.eval_shape(lambda: Decoder(spec_from_config(config), Options(), jax.random.key(0)))
    fill = lambda path, leaf: leaf.replace(jax.numpy.asarray(arrays.pop(path_name(path))))  # noqa: E731
    decoder = jax.tree_util.tree_map_with_path(fill, decoder, is_leaf=is_variable)
    assert not arrays
    logits = jax.jit(lambda d, t: d(t))(decoder, recorded["test_against_hf_gpt2_lm/inputs/input_ids"].astype(np.int32))
    np.testing.assert_allclose(logits, recorded["test_against_hf_gpt2_lm/outputs/logits"], atol=1e-5)
