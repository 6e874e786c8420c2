"""OLMo 2 (arXiv:2501.00656) and OLMo 3: norms behind attention and MLP, and over whole queries and keys."""

from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import (
    GLOBAL,
    LOCAL,
    Rotation,
    every,
    read_layer_kinds,
    read_rope,
    read_ropes_by_kind,
    refuse_mixed_layers,
)
from sft_jax.model.spec import DecoderSpec, LayerSpec


def olmo2(fields: Fields) -> DecoderSpec:
    """Returns the spec of an Olmo2ForCausalLM."""
    refuse_mixed_layers(fields, GLOBAL)
    sizes = dimensions(fields)
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    return _olmo(fields, sizes, (LayerSpec(None, rope, gated_mlp(fields)),) * layer_count(fields))


def olmo3(fields: Fields) -> DecoderSpec:
    """Returns the spec of an Olmo3ForCausalLM: three local layers to a global one, which alone has the scaled rope."""
    sizes = dimensions(fields)
    ropes = read_ropes_by_kind(fields, Rotation(sizes["head_size"], absent_theta=500000.0), "rope_theta")
    windows = {GLOBAL: None, LOCAL: fields.size("sliding_window")}
    kinds = read_layer_kinds(fields, every(layer_count(fields), 4))
    layers = tuple(LayerSpec(windows[kind], ropes[kind], gated_mlp(fields)) for kind in kinds)
    return _olmo(fields, sizes, layers)


def _olmo(fields: Fields, sizes: dict, layers: tuple[LayerSpec, ...]) -> DecoderSpec:
    bias = fields.flag("attention_bias", absent=False)
    return llama_like(
        sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False),
        pre_norms=False, post_norms=True, query_key_norm="projection", query_bias=bias, output_bias=bias,
    )  # fmt: skip
