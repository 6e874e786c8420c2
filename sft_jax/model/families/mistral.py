"""Mistral 7B, Nemo and their relatives: Llama with a window, and without biases."""

from sft_jax.model.families.fields import Fields, dimensions, layer_count
from sft_jax.model.families.positions import GLOBAL, LOCAL, read_rope, refuse_mixed_layers
from sft_jax.model.spec import DecoderSpec, LayerSpec


def mistral(fields: Fields) -> DecoderSpec:
    """Returns the spec of a MistralForCausalLM; `sliding_window: null` means that every layer sees everything."""
    window = fields.optional_size("sliding_window")
    refuse_mixed_layers(fields, GLOBAL if window is None else LOCAL)
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    layer = LayerSpec(window=window, rope=read_rope(fields))
    return DecoderSpec(
        **sizes,
        layers=(layer,) * layer_count(fields),
        activation=fields.activation("hidden_act"),
        norm_offset=0.0,
        post_norms=False,
        qk_norm=False,
        query_bias=False,
        output_bias=False,
        mlp_bias=False,
        attention_scale=sizes["head_size"] ** -0.5,
        attention_soft_cap=None,
        logit_soft_cap=None,
        embedding_scale=1.0,
        tied_head=fields.flag("tie_word_embeddings", absent=False),
    )
