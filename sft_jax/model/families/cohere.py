"""Command R and Command A: parallel blocks, LayerNorm without bias, rope of neighbouring channels."""

from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like
from sft_jax.model.families.positions import GLOBAL, LOCAL, Rotation, every, read_layer_kinds, read_rope
from sft_jax.model.spec import DecoderSpec, LayerSpec, NormSpec


def cohere(fields: Fields) -> DecoderSpec:
    """Returns the spec of a CohereForCausalLM; those with norms on queries and keys are refused by that field."""
    sizes = dimensions(fields)
    rope = read_rope(fields, Rotation(sizes["head_size"], True, absent_theta=500000.0))
    return _cohere(fields, sizes, (LayerSpec(None, rope, gated_mlp(fields)),) * layer_count(fields))


def cohere2(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Cohere2ForCausalLM: three local layers with rope to a global one without."""
    sizes = dimensions(fields)
    rope = read_rope(fields, Rotation(sizes["head_size"], True, absent_theta=10000.0))
    period = fields.size("sliding_window_pattern", absent=4)
    mlp = gated_mlp(fields)
    kinds = {LOCAL: LayerSpec(fields.size("sliding_window"), rope, mlp), GLOBAL: LayerSpec(None, None, mlp)}
    layers = tuple(kinds[kind] for kind in read_layer_kinds(fields, every(layer_count(fields), period)))
    return _cohere(fields, sizes, layers)


def _cohere(fields: Fields, sizes: dict, layers: tuple[LayerSpec, ...]) -> DecoderSpec:
    bias = fields.flag("attention_bias", absent=False)
    return llama_like(
        sizes, layers, NormSpec("layer", fields.positive("layer_norm_eps"), offset=0.0, bias=False),
        fields.flag("tie_word_embeddings", absent=True),
        parallel=True, query_bias=bias, output_bias=bias, logit_scale=fields.positive("logit_scale"),
    )  # fmt: skip
