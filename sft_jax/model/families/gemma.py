"""Gemma 2 (arXiv:2408.00118) and the text models of Gemma 3 (arXiv:2503.19786)."""

from sft_jax.model.families.fields import Fields, dimensions
from sft_jax.model.families.positions import GLOBAL, LOCAL, read_layer_kinds, read_rope, read_rope_section
from sft_jax.model.spec import DecoderSpec, LayerSpec, RopeSpec


def gemma2(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Gemma2ForCausalLM: local and global layers in turns, soft caps, norms on both sides."""
    rope = read_rope(fields, absent_theta=10000.0)
    kinds = {
        LOCAL: LayerSpec(window=fields.size("sliding_window"), rope=rope),
        GLOBAL: LayerSpec(window=None, rope=rope),
    }
    return _gemma(
        fields,
        layers=tuple(kinds[kind] for kind in read_layer_kinds(fields, absent_period=2)),
        qk_norm=False,
        attention_soft_cap=fields.optional_positive("attn_logit_softcapping"),
        logit_soft_cap=fields.optional_positive("final_logit_softcapping"),
    )


def gemma3(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Gemma3ForCausalLM: five local layers to a global one, each kind with its own rope."""
    local_rope, global_rope = _ropes_by_kind(fields)
    kinds = {
        LOCAL: LayerSpec(window=fields.size("sliding_window"), rope=local_rope),
        GLOBAL: LayerSpec(window=None, rope=global_rope),
    }
    fields.only("attn_logit_softcapping", (None,))  # in the format, but the reference implementation has none
    period = fields.size("sliding_window_pattern", absent=6)
    return _gemma(
        fields,
        layers=tuple(kinds[kind] for kind in read_layer_kinds(fields, absent_period=period)),
        qk_norm=True,
        attention_soft_cap=None,
        logit_soft_cap=fields.optional_positive("final_logit_softcapping"),
    )


def _gemma(fields: Fields, layers, qk_norm: bool, attention_soft_cap, logit_soft_cap) -> DecoderSpec:
    sizes = dimensions(fields, stated=("num_key_value_heads", "head_dim"))
    attention_bias = fields.flag("attention_bias", absent=False)
    return DecoderSpec(
        **sizes,
        layers=layers,
        activation=fields.activation("hidden_activation"),
        norm_offset=1.0,
        post_norms=True,
        qk_norm=qk_norm,
        query_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=False,
        attention_scale=fields.positive("query_pre_attn_scalar") ** -0.5,
        attention_soft_cap=attention_soft_cap,
        logit_soft_cap=logit_soft_cap,
        embedding_scale=sizes["hidden_size"] ** 0.5,
        tied_head=fields.flag("tie_word_embeddings", absent=True),  # published files leave it out
    )


def _ropes_by_kind(fields: Fields) -> tuple[RopeSpec, RopeSpec]:
    """Returns the rope of local and of global layers."""
    if "rope_parameters" in fields:
        section = fields.section("rope_parameters")
        whole = section.section(GLOBAL)
        if "rope_scaling" in fields:  # the old form beside the new one goes first, and is of the global layers
            whole = whole.merged(fields.section("rope_scaling"))
        return (
            read_rope_section(fields, section.section(LOCAL), "rope_local_base_freq"),
            read_rope_section(fields, whole, "rope_theta"),
        )
    local_rope = RopeSpec(fields.positive("rope_local_base_freq"), None)
    if "rope_scaling" in fields:
        return local_rope, read_rope_section(fields, fields.section("rope_scaling"), "rope_theta")
    return local_rope, RopeSpec(fields.positive("rope_theta"), None)
