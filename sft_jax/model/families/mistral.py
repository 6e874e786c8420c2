"""Mistral 7B, Nemo and their relatives, and CWM: Llama with a window, without biases. Mixtral is among the experts."""

from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import GLOBAL, LOCAL, Rotation, read_layer_kinds, read_rope, refuse_mixed_layers
from sft_jax.model.spec import DecoderSpec, LayerSpec


def mistral(fields: Fields) -> DecoderSpec:
    """Returns the spec of a MistralForCausalLM; `sliding_window: null` means that every layer sees everything."""
    window = fields.optional_size("sliding_window")
    refuse_mixed_layers(fields, GLOBAL if window is None else LOCAL)
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    layer = LayerSpec(window=window, rope=read_rope(fields, Rotation(sizes["head_size"])), mlp=gated_mlp(fields))
    return _mistral(fields, sizes, (layer,) * layer_count(fields))


def ministral(fields: Fields) -> DecoderSpec:
    """Returns the spec of a MinistralForCausalLM: `layer_types` says which layers have the window."""
    window = fields.optional_size("sliding_window")
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    rope = read_rope(fields, Rotation(sizes["head_size"]))
    absent = [GLOBAL if window is None else LOCAL] * layer_count(fields)
    windows = {GLOBAL: None, LOCAL: window}
    kinds = read_layer_kinds(fields, absent)
    return _mistral(fields, sizes, tuple(LayerSpec(windows[kind], rope, gated_mlp(fields)) for kind in kinds))


def ministral3(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Ministral3ForCausalLM: YaRN, and queries that grow with the position."""
    window = fields.optional_size("sliding_window")
    refuse_mixed_layers(fields, GLOBAL if window is None else LOCAL)
    sizes = dimensions(fields, stated=("num_key_value_heads", "head_dim"))
    fields.section("rope_parameters")  # the reference has numbers of one model for a file without
    rope = read_rope(fields, Rotation(sizes["head_size"], grows_queries=True))
    return _mistral(fields, sizes, (LayerSpec(window, rope, gated_mlp(fields)),) * layer_count(fields))


def cwm(fields: Fields) -> DecoderSpec:
    """Returns the spec of a CwmForCausalLM (arXiv:2510.02387): a global layer, then three local ones, all with one rope."""
    sizes = dimensions(fields, stated=("num_key_value_heads", "head_dim"))
    if "rope_scaling" not in fields:
        fields.section("rope_parameters")  # the reference has numbers of one model for a file without
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=1000000.0))
    mlp = gated_mlp(fields, bias=fields.flag("mlp_bias", absent=False))
    windows = {GLOBAL: None, LOCAL: fields.size("sliding_window")}
    absent = [LOCAL if i % 4 else GLOBAL for i in range(layer_count(fields))]
    kinds = read_layer_kinds(fields, absent)
    return _mistral(fields, sizes, tuple(LayerSpec(windows[kind], rope, mlp) for kind in kinds))


def _mistral(fields: Fields, sizes: dict, layers: tuple[LayerSpec, ...]) -> DecoderSpec:
    return llama_like(sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False))
