"""Latent attention: DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437), dense layers and then experts, and Youtu."""

from collections.abc import Sequence

from sft_jax.model.families.experts import shared_experts, sigmoid_experts
from sft_jax.model.families.fields import Fields, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.positions import Rotation, read_rope, yarn_gain
from sft_jax.model.spec import DecoderSpec, ExpertsSpec, LatentSpec, LayerSpec, MlpSpec, RouterSpec


def deepseek2(fields: Fields) -> DecoderSpec:
    """Returns the spec of a DeepseekV2ForCausalLM: softmax scores, groups chosen by their best."""
    fields.only("scoring_func", (None, "softmax"))
    fields.only("norm_topk_prob", (None, False))
    fields.only("mlp_bias", (None, False))
    grouped = fields.text("topk_method", absent="greedy") == "group_limited_greedy"
    fields.only("topk_method", (None, "greedy", "group_limited_greedy"))
    router = RouterSpec(
        score="softmax", bias=False, correction=False,
        groups=fields.size("n_group") if grouped else 1, chosen_groups=fields.size("topk_group") if grouped else 1,
        group_score="max", normalize=False, scale=fields.positive("routed_scaling_factor", absent=1.0),
    )  # fmt: skip
    return _latent(fields, _dense_then(fields, shared_experts(fields, router)), interleaved=True)


def deepseek3(fields: Fields) -> DecoderSpec:
    """Returns the spec of a DeepseekV3ForCausalLM. The layer that predicts a second token is not part of it."""
    interleaved = fields.flag("rope_interleave", absent=True)
    return _latent(fields, _dense_then(fields, sigmoid_experts(fields)), interleaved)


def youtu(fields: Fields) -> DecoderSpec:
    """Returns the spec of a YoutuForCausalLM: no experts. New embeddings are as small as other new weights."""
    mlps = [gated_mlp(fields)] * layer_count(fields)
    spread = 2.0 / (5.0 * fields.size("hidden_size")) ** 0.5
    interleaved = fields.flag("rope_interleave", absent=True)
    return _latent(fields, mlps, interleaved, absent_tied_head=True, absent_spread=spread)


def _dense_then(fields: Fields, experts: ExpertsSpec) -> list[MlpSpec | ExpertsSpec]:
    first = fields.count("first_k_dense_replace")
    return [gated_mlp(fields) if i < first else experts for i in range(layer_count(fields))]


def _latent(
    fields: Fields,
    mlps: Sequence[MlpSpec | ExpertsSpec],
    interleaved: bool,
    absent_tied_head: bool = False,
    absent_spread: float = 0.02,
) -> DecoderSpec:
    bias = fields.flag("attention_bias", absent=False)
    heads = fields.size("num_attention_heads")
    fields.only("num_key_value_heads", (None, heads))
    latent = LatentSpec(
        query_rank=fields.optional_size("q_lora_rank"), key_value_rank=fields.size("kv_lora_rank"),
        plain_size=fields.size("qk_nope_head_dim"), rope_size=fields.size("qk_rope_head_dim"),
        norm_epsilon=1e-6,  # which the reference writes down, whatever rms_norm_eps says
        bias=bias,
    )  # fmt: skip
    head_size = latent.plain_size + latent.rope_size
    sizes = dict(
        vocab_size=fields.size("vocab_size"), hidden_size=fields.size("hidden_size"), heads=heads, kv_heads=heads,
        head_size=head_size, value_size=fields.size("v_head_dim"),
        initializer_range=fields.positive("initializer_range", absent=absent_spread),
    )  # fmt: skip
    rope = read_rope(fields, Rotation(latent.rope_size, interleaved, absent_theta=10000.0))
    return llama_like(
        sizes, tuple(LayerSpec(None, rope, mlp) for mlp in mlps), rms_norm(fields),
        fields.flag("tie_word_embeddings", absent=absent_tied_head),
        latent=latent, output_bias=bias, attention_scale=head_size**-0.5 * _sharpened(fields) ** 2,
    )  # fmt: skip


def _sharpened(fields: Fields) -> float:
    """Returns what the scaling of rope makes queries, and keys, larger by."""
    section = next((fields.section(name) for name in ("rope_scaling", "rope_parameters") if name in fields), None)
    if section is None or section.text("rope_type", section.text("type", "default")) == "default":
        return 1.0
    weight = section.number("mscale_all_dim", 0.0)
    return yarn_gain(section.positive("factor"), weight) if weight else 1.0
