"""Families with LayerNorm and biases: GPT-2, StarCoder2, Nemotron, StableLM."""

from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like
from sft_jax.model.families.positions import Rotation, read_rope
from sft_jax.model.spec import DecoderSpec, LayerSpec, MlpSpec, NormSpec


def gpt2(fields: Fields) -> DecoderSpec:
    """Returns the spec of a GPT2LMHeadModel (Radford et al. 2019): learned positions, a plain MLP, biases everywhere."""
    hidden = fields.size("n_embd")
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    renamed = fields.renamed(names)
    sizes = dimensions(renamed)
    mlp = MlpSpec(fields.size("n_inner", absent=4 * hidden), False, fields.activation("activation_function"), bias=True)
    return llama_like(
        sizes, (LayerSpec(None, None, mlp),) * layer_count(renamed), _layer_norm(fields, "layer_norm_epsilon"),
        fields.flag("tie_word_embeddings", absent=True),
        query_bias=True, output_bias=True, learned_positions=fields.size("n_positions"),
    )  # fmt: skip


def starcoder2(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Starcoder2ForCausalLM (arXiv:2402.19173): a plain MLP."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    bias = fields.flag("use_bias", absent=True)
    mlp = MlpSpec(fields.size("intermediate_size"), False, fields.activation("hidden_act"), bias)
    window = fields.optional_size("sliding_window") if "sliding_window" in fields else None
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    return llama_like(
        sizes, (LayerSpec(window, rope, mlp),) * layer_count(fields), _layer_norm(fields, "norm_epsilon"),
        fields.flag("tie_word_embeddings", absent=True), query_bias=bias, output_bias=bias,
    )  # fmt: skip


def nemotron(fields: Fields) -> DecoderSpec:
    """Returns the spec of a NemotronForCausalLM (arXiv:2402.16819): LayerNorm around 1, squared ReLU, half of the head."""
    sizes = dimensions(fields)
    mlp_bias = fields.flag("mlp_bias", absent=False)
    mlp = MlpSpec(fields.size("intermediate_size"), False, fields.activation("hidden_act"), mlp_bias)
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0, absent_part=0.5))
    bias = fields.flag("attention_bias", absent=False)
    return llama_like(
        sizes, (LayerSpec(None, rope, mlp),) * layer_count(fields), _layer_norm(fields, "norm_eps", offset=1.0),
        fields.flag("tie_word_embeddings", absent=False), query_bias=bias, output_bias=bias,
    )  # fmt: skip


def stablelm(fields: Fields) -> DecoderSpec:
    """Returns the spec of a StableLmForCausalLM without parallel blocks and norms on queries and keys."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0, absent_part=0.25))
    return llama_like(
        sizes, (LayerSpec(None, rope, gated_mlp(fields)),) * layer_count(fields), _layer_norm(fields, "layer_norm_eps"),
        fields.flag("tie_word_embeddings", absent=False), query_bias=fields.flag("use_qkv_bias", absent=False),
    )  # fmt: skip


def _layer_norm(fields: Fields, name: str, offset: float = 0.0) -> NormSpec:
    return NormSpec("layer", fields.positive(name), offset, bias=True)
