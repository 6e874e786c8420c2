"""Gemma 1 (arXiv:2403.08295), Gemma 2 (arXiv:2408.00118), VaultGemma and the text models of Gemma 3 (arXiv:2503.19786)."""

from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import (
    GLOBAL,
    LOCAL,
    Rotation,
    every,
    read_layer_kinds,
    read_rope,
    read_ropes_by_kind,
)
from sft_jax.model.spec import DecoderSpec, LayerSpec, MlpSpec

_STATED = ("num_key_value_heads", "head_dim")
# What the text section of published multimodal files leaves out and the reference implementation fills in.
_TEXT_DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}  # fmt: skip


def gemma(fields: Fields) -> DecoderSpec:
    """Returns the spec of a GemmaForCausalLM. Old files say "gelu" and mean its tanh approximation."""
    sizes = dimensions(fields, _STATED)
    activation = fields.activation("hidden_act")
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    fields.only("hidden_activation", (None, activation))
    mlp = MlpSpec(fields.size("intermediate_size"), True, activation, bias=False)
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    layers = (LayerSpec(None, rope, mlp),) * layer_count(fields)
    return _gemma(fields, sizes, layers, attention_scale=sizes["head_size"] ** -0.5)


def gemma2(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Gemma2ForCausalLM: local and global layers in turns, soft caps, norms on both sides."""
    return _gemma2(fields, post_norms=True)


def vault_gemma(fields: Fields) -> DecoderSpec:
    """Returns the spec of a VaultGemmaForCausalLM: Gemma 2 without norms behind attention and MLP."""
    return _gemma2(fields, post_norms=False)


def _gemma2(fields: Fields, post_norms: bool) -> DecoderSpec:
    sizes = dimensions(fields, _STATED)
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    windows = {LOCAL: fields.size("sliding_window"), GLOBAL: None}
    kinds = read_layer_kinds(fields, every(layer_count(fields), 2))
    mlp = gated_mlp(fields, "hidden_activation")
    return _gemma(
        fields, sizes, tuple(LayerSpec(windows[kind], rope, mlp) for kind in kinds),
        post_norms=post_norms,
        attention_scale=fields.positive("query_pre_attn_scalar") ** -0.5,
        attention_soft_cap=fields.optional_positive("attn_logit_softcapping"),
        logit_soft_cap=fields.optional_positive("final_logit_softcapping"),
    )  # fmt: skip


def gemma3(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Gemma3ForCausalLM: five local layers to a global one, each kind with its own rope."""
    sizes = dimensions(fields, _STATED)
    rotation = Rotation(sizes["head_size"])
    ropes = read_ropes_by_kind(fields, rotation, "rope_local_base_freq")
    windows = {LOCAL: fields.size("sliding_window"), GLOBAL: None}
    fields.only("attn_logit_softcapping", (None,))  # in the format, but the reference implementation has none
    period = fields.size("sliding_window_pattern", absent=6)
    kinds = read_layer_kinds(fields, every(layer_count(fields), period))
    mlp = gated_mlp(fields, "hidden_activation")
    return _gemma(
        fields, sizes, tuple(LayerSpec(windows[kind], ropes[kind], mlp) for kind in kinds),
        post_norms=True,
        query_key_norm="head",
        attention_scale=fields.positive("query_pre_attn_scalar") ** -0.5,
        logit_soft_cap=fields.optional_positive("final_logit_softcapping"),
    )  # fmt: skip


def gemma3_multimodal(fields: Fields) -> DecoderSpec:
    """Returns the spec of the text model in a Gemma3ForConditionalGeneration; its vision tower is carried along."""
    text = fields.section("text_config").with_defaults(_TEXT_DEFAULTS)
    spec = gemma3(text)
    text.refuse_unsupported()
    return spec


def _gemma(fields: Fields, sizes: dict, layers: tuple[LayerSpec, ...], **changes) -> DecoderSpec:
    bias = fields.flag("attention_bias", absent=False)
    return llama_like(
        sizes, layers, rms_norm(fields, offset=1.0),
        fields.flag("tie_word_embeddings", absent=True),  # published files leave it out
        query_bias=bias, output_bias=bias, embedding_scale=sizes["hidden_size"] ** 0.5, **changes,
    )  # fmt: skip
