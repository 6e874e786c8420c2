"""Qwen 2, 2.5 (arXiv:2412.15115) and 3 (arXiv:2505.09388), dense."""

from sft_jax.errors import UserError
from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import GLOBAL, LOCAL, Rotation, read_layer_kinds, read_rope
from sft_jax.model.spec import DecoderSpec, LayerSpec


def qwen2(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Qwen2ForCausalLM: biases on queries, keys and values, always."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    return _qwen(fields, sizes, query_bias=True)


def qwen3(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Qwen3ForCausalLM: norms on the heads of queries and keys."""
    sizes = dimensions(fields, stated=("num_key_value_heads", "head_dim"))
    bias = fields.flag("attention_bias", absent=False)
    return _qwen(fields, sizes, query_bias=bias, output_bias=bias, query_key_norm="head")


def _qwen(fields: Fields, sizes: dict, **changes) -> DecoderSpec:
    count = layer_count(fields)
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    windows = {GLOBAL: None}
    absent = [GLOBAL] * count
    if fields.flag("use_sliding_window", absent=False):
        windows[LOCAL] = fields.size("sliding_window")
        first = fields.number("max_window_layers", absent=28)  # published files name a layer that is not there
        absent = [LOCAL if i >= first else GLOBAL for i in range(count)]
    kinds = read_layer_kinds(fields, absent)
    if LOCAL in kinds and LOCAL not in windows:
        raise UserError(f"{fields.where}: 'layer_types' names local layers, but 'use_sliding_window' is not true.")
    layers = tuple(LayerSpec(windows[kind], rope, gated_mlp(fields)) for kind in kinds)
    return llama_like(sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False), **changes)
