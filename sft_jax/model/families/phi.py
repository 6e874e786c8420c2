"""Phi-3, Phi-3.5 and Phi-4 (arXiv:2404.14219): Llama with LongRoPE; its file holds fused projections."""

from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import ORIGINAL, Rotation, read_rope
from sft_jax.model.spec import DecoderSpec, LayerSpec


def phi3(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Phi3ForCausalLM. Dropout is not used in tuning."""
    sizes = dimensions(fields)
    if "rope_scaling" in fields or ("rope_parameters" in fields and "long_factor" in fields.section("rope_parameters")):
        fields.size(ORIGINAL)  # the reference has a number of one model for a file without
    rotation = Rotation(sizes["head_size"], absent_theta=10000.0, absent_part=1.0, aliases=("su", "yarn"))
    window = fields.optional_size("sliding_window") if "sliding_window" in fields else None
    layer = LayerSpec(window=window, rope=read_rope(fields, rotation), mlp=gated_mlp(fields))
    tied = fields.flag("tie_word_embeddings", absent=False)
    return llama_like(sizes, (layer,) * layer_count(fields), rms_norm(fields), tied)
