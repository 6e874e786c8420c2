"""GLM-4: half of each head is rotated, in neighbouring channels; the MLP is fused in the file."""

from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import Rotation, read_rope
from sft_jax.model.spec import DecoderSpec, LayerSpec


def glm(fields: Fields) -> DecoderSpec:
    """Returns the spec of a GlmForCausalLM."""
    return _glm(fields, post_norms=False)


def glm4(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Glm4ForCausalLM: norms on both sides of attention and MLP."""
    return _glm(fields, post_norms=True)


def _glm(fields: Fields, post_norms: bool) -> DecoderSpec:
    sizes = dimensions(fields, stated=("num_key_value_heads", "head_dim"))
    rope = read_rope(fields, Rotation(sizes["head_size"], True, absent_theta=10000.0, absent_part=0.5))
    layers = (LayerSpec(None, rope, gated_mlp(fields)),) * layer_count(fields)
    return llama_like(
        sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False),
        query_bias=fields.flag("attention_bias", absent=True), post_norms=post_norms,
    )  # fmt: skip
