"""Llama 1, 2, 3, 3.1, 3.2, 3.3 and everything published under the same architecture."""

from sft_jax.model.families.fields import Fields, dimensions, layer_count
from sft_jax.model.families.positions import GLOBAL, read_rope, refuse_mixed_layers
from sft_jax.model.spec import DecoderSpec, LayerSpec


def llama(fields: Fields) -> DecoderSpec:
    """Returns the spec of a LlamaForCausalLM. What `absent` says is what transformers' LlamaConfig says."""
    refuse_mixed_layers(fields, GLOBAL)
    sizes = dimensions(fields)
    attention_bias = fields.flag("attention_bias", absent=False)
    layer = LayerSpec(window=None, rope=read_rope(fields, absent_theta=10000.0))
    return DecoderSpec(
        **sizes,
        layers=(layer,) * layer_count(fields),
        activation=fields.activation("hidden_act"),
        norm_offset=0.0,
        post_norms=False,
        qk_norm=False,
        query_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", absent=False),
        attention_scale=sizes["head_size"] ** -0.5,
        attention_soft_cap=None,
        logit_soft_cap=None,
        embedding_scale=1.0,
        tied_head=fields.flag("tie_word_embeddings", absent=False),
    )
