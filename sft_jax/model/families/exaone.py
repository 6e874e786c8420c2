"""EXAONE 4 (arXiv:2507.11407): norms behind attention and MLP, global layers without rope where others are local."""

from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import GLOBAL, LOCAL, Rotation, every, read_layer_kinds, read_rope
from sft_jax.model.spec import DecoderSpec, LayerSpec


def exaone4(fields: Fields) -> DecoderSpec:
    """Returns the spec of an Exaone4ForCausalLM."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    window = fields.optional_size("sliding_window")
    mlp = gated_mlp(fields)
    kinds = {
        LOCAL: LayerSpec(window, rope, mlp),
        GLOBAL: LayerSpec(None, rope if window is None else None, mlp),
    }
    period = 0
    if window is not None and "layer_types" not in fields:
        period = fields.size("sliding_window_pattern")
    layers = tuple(kinds[kind] for kind in read_layer_kinds(fields, every(layer_count(fields), period)))
    return llama_like(
        sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False),
        pre_norms=False, post_norms=True, query_key_norm="head",
    )  # fmt: skip
