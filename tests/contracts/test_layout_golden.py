"""How the parameters of published models are laid out: one golden file per architecture, a line per parameter.

A changed line is a changed layout, which changes memory and speed of every run: look at it, then write the files anew
with `SFT_JAX_UPDATE_GOLDENS=1 pytest tests/contracts/test_layout_golden.py`.
"""

import os
from pathlib import Path

import jax
import pytest

from sft_jax.errors import UserError
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import FAMILIES, spec_from_config
from sft_jax.model.options import Options
from sft_jax.model.sharding import abstract_mesh, named_leaves, shardings

GOLDENS = Path(__file__).parents[1] / "goldens" / "layout"

# config.json of published models, without what does not reach the decoder.
CONFIGS = {
    "LlamaForCausalLM": {  # meta-llama/Llama-3.2-1B
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
    },
    "MistralForCausalLM": {  # mistralai/Mistral-7B-v0.1
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "sliding_window": 4096,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "initializer_range": 0.02,
    },
    "Gemma2ForCausalLM": {  # google/gemma-2-2b
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "attention_bias": False, "initializer_range": 0.02,
    },
    "Gemma3ForCausalLM": {  # google/gemma-3-1b-pt
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "attention_bias": False, "initializer_range": 0.02,
    },
}  # fmt: skip
PARAMETERS = {  # as published
    "LlamaForCausalLM": 1_235_814_400, "MistralForCausalLM": 7_241_732_096, "Gemma2ForCausalLM": 2_614_341_888,
    "Gemma3ForCausalLM": 999_885_952,
}  # fmt: skip
# Meshes (data, fsdp, tensor); the layout must not depend on them.
MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 4, 2), "all": (2, 2, 2)}
REFUSED = {("Gemma3ForCausalLM", "tensor"), ("Gemma3ForCausalLM", "all")}  # one kv head cannot be divided


def abstract(architecture: str) -> Decoder:
    spec = spec_from_config({"architectures": [architecture], **CONFIGS[architecture]})
    return jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0)))


def lines(decoder: Decoder, mesh) -> list[str]:
    placed = named_leaves(shardings(decoder, mesh))
    return [
        f"{path} {'x'.join(map(str, leaf.get_value().shape))} ({', '.join(map(str, place.get_value().spec))})"
        for (path, leaf), (_, place) in zip(named_leaves(decoder), placed, strict=True)
    ]


def test_every_architecture_has_a_golden():
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_layout(architecture):
    decoder = abstract(architecture)
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder)) == PARAMETERS[architecture]
    golden = GOLDENS / f"{architecture}.txt"
    if os.environ.get("SFT_JAX_UPDATE_GOLDENS") == "1":
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text("\n".join(lines(decoder, abstract_mesh(1, 1, 1))) + "\n")
    expected = golden.read_text().splitlines()
    for name, sizes in MESHES.items():
        if (architecture, name) in REFUSED:
            with pytest.raises(UserError, match=r"attention\.key\.kernel .*: mesh.tensor=2 does not divide 1 kv_heads"):
                lines(decoder, abstract_mesh(*sizes))
        else:
            assert lines(decoder, abstract_mesh(*sizes)) == expected, name
