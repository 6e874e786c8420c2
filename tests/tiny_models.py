"""Tiny random models of every family, as config.json dicts, and the same weights in transformers and here."""

import copy
import functools
import json
import tempfile
from collections.abc import Collection

import jax
import numpy as np
from family_configs import MORE_CONFIGS
from flax import nnx

from sft_jax.hf import match
from sft_jax.hf.files import open_tensors
from sft_jax.hf.names import name_table
from sft_jax.hf.rules import Stored
from sft_jax.hf.source import Source
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.options import Options
from sft_jax.model.sharding import named_leaves

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.02,
}  # fmt: skip
_LLAMA = {
    **_SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3, "head_dim": 8,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_theta": 500.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# Caps and the scale are far smaller than in published models, so that a few random layers feel them.
_GEMMA = {
    **_SIZES, "head_dim": 16, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 8,
    "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 24,
}  # fmt: skip

CONFIGS: dict[str, dict] = {
    "llama": _LLAMA,
    "llama_tied_biases": {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama_multi_head": {**_LLAMA, "num_key_value_heads": 4},
    "llama3_rope": {**_LLAMA, "rope_parameters": _LLAMA3_ROPE},
    "llama_linear_rope": {
        **_LLAMA,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
    },
    "mistral": {
        **{key: value for key, value in _LLAMA.items() if not key.endswith("_bias")},
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8,
    },
    "gemma2": {
        **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gemma3": {
        **_GEMMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 7,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"],
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
            "full_attention": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 8.0},
        },
    },
}  # fmt: skip
FAMILY_CONFIGS = ("llama", "mistral", "gemma2", "gemma3")
# Beside them, one for every other way in which something is computed.
KINDS = (*FAMILY_CONFIGS, "gpt2", "cohere2", "olmo3", "phi3", "granite", "gpt_oss", "qwen2_moe", "deepseek_v3")
ALL_CONFIGS: dict[str, dict] = {**CONFIGS, **MORE_CONFIGS}


@functools.cache
def torch_model(name: str):
    """The transformers model of a config, every parameter random: norms and biases too."""
    import torch
    import transformers

    values = copy.deepcopy(ALL_CONFIGS[name])  # transformers writes into what it is given
    config = transformers.AutoConfig.for_model(**values)
    torch.manual_seed(0)
    architecture = getattr(transformers, values["architectures"][0])
    model = architecture._from_config(config, attn_implementation="eager", dtype=torch.float32)
    corrections = [buffer for path, buffer in model.named_buffers() if path.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for parameter in [*model.parameters(), *corrections]:
            spread = 0.3 if parameter.ndim == 1 else 0.15
            parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def checkpoint_tensors(model) -> dict[str, np.ndarray]:
    """The tensors of a transformers model as its checkpoint names and shapes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        directory = open_tensors(folder)
        return {tensor: directory.read(tensor) for tensor in directory.tensors}


@functools.cache
def twin(name: str, options: Options = Options()) -> Decoder:
    """The decoder with the weights of `torch_model(name)`."""
    return from_tensors(abstract(name, options), checkpoint_tensors(torch_model(name)), ALL_CONFIGS[name])


@functools.cache
def random_decoder(name: str, options: Options = Options()) -> Decoder:
    """A decoder of a config with random parameters; needs no torch."""
    return randomized(abstract(name, options))


def randomized(decoder: Decoder) -> Decoder:
    """Fills an abstract decoder with numbers that depend on path and shape only; nothing is 0 or 1."""

    def fill(path, leaf: nnx.Variable) -> nnx.Variable:
        shape = leaf.get_value().shape
        rng = np.random.default_rng([*dotted(path).encode(), *shape])
        matrix = leaf.axes[-1] != "norm"
        value = rng.normal(size=shape, scale=0.2) if matrix else rng.normal(size=shape, scale=0.3, loc=0.5)
        return leaf.replace(jax.numpy.asarray(value, np.float32))

    return jax.tree_util.tree_map_with_path(fill, decoder, is_leaf=is_variable)


def abstract(name: str, options: Options = Options()) -> Decoder:
    spec = spec_from_config(ALL_CONFIGS[name])
    decoder = jax.eval_shape(lambda: Decoder(spec, options, jax.random.key(0)))
    decoder.source = Source(name, json.dumps(ALL_CONFIGS[name]), None)
    return decoder


def stored_tensors(decoder: Decoder, config: dict, names: Collection[str] = ()) -> list[Stored]:
    """The tensors of the checkpoint of a decoder, abstract or not; where in it they are follows from its `names`."""
    table = name_table(config)
    return match.stored_tensors(decoder, table, table.find_root(names) or table.roots[0])


def from_tensors(decoder: Decoder, tensors: dict[str, np.ndarray], config: dict) -> Decoder:
    """Fills an abstract decoder from the tensors of a checkpoint by the table of names."""
    arrays = {path: np.zeros(leaf.get_value().shape, np.float32) for path, leaf in named_leaves(decoder)}
    for tensor in stored_tensors(decoder, config, tensors):
        for number, path in enumerate(tensor.paths):
            arrays[path][extent(tensor, number)] = tensor.packing.cut(tensors[tensor.name], number)
    fill = lambda path, leaf: leaf.replace(jax.numpy.asarray(arrays[dotted(path)]))  # noqa: E731
    return jax.tree_util.tree_map_with_path(fill, decoder, is_leaf=is_variable)


def to_tensors(decoder: Decoder, state, config: dict) -> dict[str, np.ndarray]:
    """The inverse, for a tree like the decoder such as its gradient: arrays by the names that transformers writes."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable)
    arrays = {dotted(path): np.asarray(leaf[...]) for path, leaf in leaves}
    return {
        tensor.name: tensor.packing.join([arrays[path][extent(tensor, i)] for i, path in enumerate(tensor.paths)])
        for tensor in stored_tensors(decoder, config)
    }


def extent(tensor: Stored, number: int) -> tuple:
    """Where in its parameter part `number` of a tensor is: not in the rows that are no tokens."""
    return (*tensor.index, *map(slice, tensor.packing.parameter_shape(number)))


def dotted(path) -> str:
    """A path of tree keys as a parameter path."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def packed_rows(rng: np.random.Generator, rows: int, length: int, vocab: int = 96) -> tuple[np.ndarray, ...]:
    """Tokens, positions and segments of rows that hold several documents and end in padding."""
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        filled = length - int(rng.integers(0, 5))
        cuts = [0, *sorted(rng.choice(np.arange(1, filled), 3, replace=False)), filled]
        for number, (start, end) in enumerate(zip(cuts, cuts[1:])):
            segments[row, start:end] = number + 1
            positions[row, start:end] = np.arange(end - start)
    return tokens, positions, segments
