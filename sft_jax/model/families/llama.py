"""Llama 1, 2, 3, 3.1, 3.2, 3.3 and what differs from them by a field or two.

These are Arcee, ERNIE 4.5, Granite, Helium, HyperCLOVA X, Seed-OSS and SmolLM3.
"""

from typing import Any

from sft_jax.errors import UserError
from sft_jax.model.families.fields import Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import GLOBAL, LOCAL, Rotation, read_layer_kinds, read_rope, refuse_mixed_layers
from sft_jax.model.spec import DecoderSpec, LayerSpec, MlpSpec


def llama(fields: Fields) -> DecoderSpec:
    """Returns the spec of a LlamaForCausalLM. What `absent` says is what transformers' LlamaConfig says."""
    return _llama(fields, gated_mlp(fields, bias=fields.flag("mlp_bias", absent=False)))


def arcee(fields: Fields) -> DecoderSpec:
    """Returns the spec of an ArceeForCausalLM: a plain MLP with squared ReLU."""
    bias = fields.flag("mlp_bias", absent=False)
    return _llama(fields, MlpSpec(fields.size("intermediate_size"), False, fields.activation("hidden_act"), bias))


def ernie4_5(fields: Fields) -> DecoderSpec:
    """Returns the spec of an Ernie4_5ForCausalLM: neighbouring channels are rotated, one field is of all biases."""
    bias = fields.flag("use_bias", absent=False)
    return _llama(
        fields,
        gated_mlp(fields, bias=bias),
        ("num_key_value_heads", "head_dim"),
        500000.0,
        interleaved=True,
        absent_tied_head=True,
        query_bias=bias,
        output_bias=bias,
    )


def helium(fields: Fields) -> DecoderSpec:
    """Returns the spec of a HeliumForCausalLM: neighbouring channels are rotated, no output bias."""
    bias = fields.flag("mlp_bias", absent=False)
    stated = ("num_key_value_heads", "head_dim")
    return _llama(fields, gated_mlp(fields, bias=bias), stated, 100000.0, interleaved=True, output_bias=False)


def seed_oss(fields: Fields) -> DecoderSpec:
    """Returns the spec of a SeedOssForCausalLM: the biases of attention are stated apart."""
    fields.number("attention_dropout", absent=0.0)  # of its pre-training; published files have 0.1, tuning uses none
    return _llama(
        fields,
        gated_mlp(fields, bias=fields.flag("mlp_bias", absent=False)),
        stated=("head_dim",),
        query_bias=fields.flag("attention_bias", absent=True),
        output_bias=fields.flag("attention_out_bias", absent=False),
    )


def granite(fields: Fields) -> DecoderSpec:
    """Returns the spec of a GraniteForCausalLM: four multipliers."""
    return _llama(fields, gated_mlp(fields, bias=fields.flag("mlp_bias", absent=False)), **granite_scales(fields))


def hyperclovax(fields: Fields) -> DecoderSpec:
    """Returns the spec of a HyperCLOVAXForCausalLM: Granite's multipliers and norms behind attention and MLP.

    `logits_scaling` multiplies here, where Granite divides by it; left out, the scale of scores is Llama's.
    """
    scales = granite_scales(fields, absent_attention=dimensions(fields)["head_size"] ** -0.5)
    return _llama(
        fields,
        gated_mlp(fields, bias=fields.flag("mlp_bias", absent=False)),
        post_norms=fields.flag("use_post_norm", absent=True),
        **(scales | dict(logit_scale=fields.positive("logits_scaling", absent=1.0))),
    )


def granite_scales(fields: Fields, absent_attention: float = 1.0) -> dict[str, float]:
    """Returns what Granite multiplies embeddings, residuals, scores and logits by."""
    return dict(
        embedding_scale=fields.positive("embedding_multiplier", absent=1.0),
        residual_scale=fields.positive("residual_multiplier", absent=1.0),
        attention_scale=fields.positive("attention_multiplier", absent=absent_attention),
        logit_scale=1.0 / fields.positive("logits_scaling", absent=1.0),
    )


def _llama(
    fields: Fields,
    mlp: MlpSpec,
    stated: tuple[str, ...] = (),
    absent_theta: float = 10000.0,
    interleaved: bool = False,
    absent_tied_head: bool = False,
    **changes: Any,
) -> DecoderSpec:
    refuse_mixed_layers(fields, GLOBAL)
    sizes = dimensions(fields, stated)
    bias = fields.flag("attention_bias", absent=False) if "query_bias" not in changes else False
    rope = read_rope(fields, Rotation(sizes["head_size"], interleaved, absent_theta))
    layer = LayerSpec(window=None, rope=rope, mlp=mlp)
    return llama_like(
        sizes,
        (layer,) * layer_count(fields),
        rms_norm(fields),
        fields.flag("tie_word_embeddings", absent=absent_tied_head),
        **(dict(query_bias=bias, output_bias=bias) | changes),
    )


def smollm3(fields: Fields) -> DecoderSpec:
    """Returns the spec of a SmolLM3ForCausalLM: some layers have no rope, and those may be local."""
    count = layer_count(fields)
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=2000000.0))
    mlp = gated_mlp(fields, bias=fields.flag("mlp_bias", absent=False))
    period = fields.size("no_rope_layer_interval", absent=4)
    rotated = fields.integers("no_rope_layers") or [int((i + 1) % period != 0) for i in range(count)]
    if len(rotated) != count or not set(rotated) <= {0, 1}:
        raise UserError(f"{fields.where}: 'no_rope_layers' must hold a 0 or 1 for each of the {count} layers.")
    window = None
    if fields.flag("use_sliding_window", absent=False):
        window = fields.optional_size("sliding_window") if "sliding_window" in fields else None
    kinds = read_layer_kinds(fields, [GLOBAL if has or window is None else LOCAL for has in rotated])
    bias = fields.flag("attention_bias", absent=False)
    if LOCAL in kinds and window is None:
        raise UserError(f"{fields.where}: 'layer_types' names local layers, but there is no 'sliding_window' in use.")
    layers = tuple(
        LayerSpec(window=window if kind == LOCAL else None, rope=rope if has else None, mlp=mlp)
        for kind, has in zip(kinds, rotated, strict=True)
    )
    tied = fields.flag("tie_word_embeddings", absent=True)
    return llama_like(sizes, layers, rms_norm(fields), tied, query_bias=bias, output_bias=bias)
