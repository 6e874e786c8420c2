"""Mixtures of experts on the blocks of Llama.

These are Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, Granite MoE, GLM-4.5, dots.llm1 and GPT-OSS.
"""

from sft_jax.errors import UserError
from sft_jax.model.families.fields import REQUIRED, Fields, dimensions, gated_mlp, layer_count, llama_like, rms_norm
from sft_jax.model.families.llama import granite_scales
from sft_jax.model.families.positions import GLOBAL, LOCAL, Rotation, every, read_layer_kinds, read_rope
from sft_jax.model.spec import ClampedGate, DecoderSpec, ExpertsSpec, LayerSpec, RouterSpec


def mixtral(fields: Fields) -> DecoderSpec:
    """Returns the spec of a MixtralForCausalLM (arXiv:2401.04088)."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    experts = _experts(fields, fields.size("num_local_experts"), fields.size("intermediate_size"), normalize=True)
    window = fields.optional_size("sliding_window") if "sliding_window" in fields else None
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=1000000.0))
    fields.only("router_jitter_noise", (None, 0))
    layers = (LayerSpec(window, rope, experts),) * layer_count(fields)
    return llama_like(sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False))


def qwen2_moe(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Qwen2MoeForCausalLM: a gated shared MLP beside the experts, some layers dense."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    experts = _experts(
        fields, fields.size("num_experts"), fields.size("moe_intermediate_size"),
        normalize=fields.flag("norm_topk_prob", absent=False),
        shared_size=fields.size("shared_expert_intermediate_size"), shared_gate=True,
    )  # fmt: skip
    fields.only("use_sliding_window", (None, False))
    if "layer_types" in fields and LOCAL in fields.strings("layer_types"):
        raise UserError(f"{fields.where}: 'layer_types' names local layers, but 'use_sliding_window' is not true.")
    bias = fields.flag("qkv_bias", absent=True)
    return _qwen_moe(fields, sizes, experts, query_bias=bias)


def qwen3_moe(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Qwen3MoeForCausalLM (arXiv:2505.09388): norms on heads, no shared MLP."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    count = fields.size("num_experts") if "num_experts" in fields else fields.size("num_local_experts")
    fields.only("num_local_experts", (None, count))
    normalize = fields.flag("norm_topk_prob", absent=False)
    experts = _experts(fields, count, fields.size("moe_intermediate_size"), normalize)
    bias = fields.flag("attention_bias", absent=False)
    fields.only("use_sliding_window", (None, False))
    return _qwen_moe(fields, sizes, experts, query_bias=bias, output_bias=bias, query_key_norm="head")


def _qwen_moe(fields: Fields, sizes: dict, experts: ExpertsSpec, **changes) -> DecoderSpec:
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    step = fields.size("decoder_sparse_step", absent=1)
    dense = set(fields.integers("mlp_only_layers"))
    layers = tuple(
        LayerSpec(None, rope, experts if i not in dense and (i + 1) % step == 0 else gated_mlp(fields))
        for i in range(layer_count(fields))
    )
    return llama_like(sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False), **changes)


def olmoe(fields: Fields) -> DecoderSpec:
    """Returns the spec of an OlmoeForCausalLM (arXiv:2409.02060): norms over whole queries and keys."""
    sizes = dimensions(fields)
    normalize = fields.flag("norm_topk_prob", absent=False)
    experts = _experts(fields, fields.size("num_experts"), fields.size("intermediate_size"), normalize)
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    bias = fields.flag("attention_bias", absent=False)
    return llama_like(
        sizes, (LayerSpec(None, rope, experts),) * layer_count(fields), rms_norm(fields),
        fields.flag("tie_word_embeddings", absent=False),
        query_key_norm="projection", query_bias=bias, output_bias=bias,
    )  # fmt: skip


def granite_moe(fields: Fields) -> DecoderSpec:
    """Returns the spec of a GraniteMoeForCausalLM: Granite's multipliers, a softmax over the chosen experts."""
    return _granite_moe(fields, shared_size=None)


def granite_moe_shared(fields: Fields) -> DecoderSpec:
    """Returns the spec of a GraniteMoeSharedForCausalLM: Granite MoE with an MLP beside the experts, which may be absent."""
    return _granite_moe(fields, fields.count("shared_intermediate_size", absent=0) or None)


def _granite_moe(fields: Fields, shared_size: int | None) -> DecoderSpec:
    sizes = dimensions(fields)
    count, size = fields.size("num_local_experts"), fields.size("intermediate_size")
    experts = _experts(fields, count, size, normalize=True, shared_size=shared_size)
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    bias = fields.flag("attention_bias", absent=False)
    return llama_like(
        sizes, (LayerSpec(None, rope, experts),) * layer_count(fields), rms_norm(fields),
        fields.flag("tie_word_embeddings", absent=False),
        query_bias=bias, output_bias=bias, **granite_scales(fields),
    )  # fmt: skip


def glm4_moe(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Glm4MoeForCausalLM (GLM-4.5, arXiv:2508.06471): DeepSeek-V3's experts on GLM's attention."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0, absent_part=0.5))
    experts, first = sigmoid_experts(fields), fields.count("first_k_dense_replace", absent=1)
    layers = tuple(
        LayerSpec(None, rope, gated_mlp(fields) if i < first else experts) for i in range(layer_count(fields))
    )
    return llama_like(
        sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False),
        query_bias=fields.flag("attention_bias", absent=False),
        query_key_norm="head" if fields.flag("use_qk_norm", absent=False) else None,
    )  # fmt: skip


def dots1(fields: Fields) -> DecoderSpec:
    """Returns the spec of a Dots1ForCausalLM (arXiv:2506.05767): DeepSeek-V3's experts on Qwen 3's attention."""
    sizes = dimensions(fields, stated=("num_key_value_heads",))
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=10000.0))
    experts, first = sigmoid_experts(fields, absent_groups=1), fields.count("first_k_dense_replace", absent=0)
    mlps = [gated_mlp(fields) if i < first else experts for i in range(layer_count(fields))]
    layers = tuple(LayerSpec(window, rope, mlp) for window, mlp in zip(_dots1_windows(fields), mlps, strict=True))
    bias = fields.flag("attention_bias", absent=False)
    return llama_like(
        sizes, layers, rms_norm(fields), fields.flag("tie_word_embeddings", absent=False),
        query_bias=bias, output_bias=bias, query_key_norm="head",
    )  # fmt: skip


def _dots1_windows(fields: Fields) -> list[int | None]:
    """Returns the window of each layer, without a switch as Qwen's: where there is a window, later layers have it."""
    window = fields.optional_size("sliding_window")
    first = fields.count("max_window_layers", absent=62)
    absent = [GLOBAL if window is None or i < first else LOCAL for i in range(layer_count(fields))]
    kinds = read_layer_kinds(fields, absent)
    if LOCAL in kinds and window is None:
        raise UserError(f"{fields.where}: 'layer_types' names local layers, but 'sliding_window' is null.")
    return [window if kind == LOCAL else None for kind in kinds]


def gpt_oss(fields: Fields) -> DecoderSpec:
    """Returns the spec of a GptOssForCausalLM: attention sinks, and experts with biases and a clamped gate.

    The reference's router takes a softmax over the chosen logits, which is the softmax over all, normalised.
    """
    sizes = dimensions(fields, stated=("num_key_value_heads", "head_dim"))
    if "rope_scaling" not in fields:
        fields.section("rope_parameters")  # the reference has numbers of one model for a file without
    rope = read_rope(fields, Rotation(sizes["head_size"], absent_theta=150000.0))
    gate = ClampedGate(fields.positive("swiglu_alpha", absent=1.702), fields.positive("swiglu_limit", absent=7.0))
    experts = ExpertsSpec(
        count=fields.size("num_local_experts"), chosen=fields.size("num_experts_per_tok"),
        size=fields.size("intermediate_size"), activation=gate, bias=True,
        router=_softmax_router(normalize=True, bias=True), shared_size=None, shared_gate=False,
    )  # fmt: skip
    fields.only("num_experts", (None, experts.count))
    fields.only("hidden_act", (None, "silu"))  # written, and not read: the gate is its own
    windows = {GLOBAL: None, LOCAL: fields.size("sliding_window")}
    kinds = read_layer_kinds(fields, every(layer_count(fields), 2))
    bias = fields.flag("attention_bias", absent=True)
    return llama_like(
        sizes, tuple(LayerSpec(windows[kind], rope, experts) for kind in kinds), rms_norm(fields),
        fields.flag("tie_word_embeddings", absent=False), query_bias=bias, output_bias=bias, sinks=True,
    )  # fmt: skip


def sigmoid_experts(fields: Fields, absent_groups: int | object = REQUIRED) -> ExpertsSpec:
    """Returns the experts of DeepSeek-V3 (arXiv:2412.19437): sigmoid scores, corrected for the choice only."""
    fields.only("scoring_func", (None, "sigmoid", "noaux_tc"))  # files of dots.llm1 write the method here
    fields.only("topk_method", (None, "noaux_tc"))
    router = RouterSpec(
        score="sigmoid", bias=False, correction=True,
        groups=fields.size("n_group", absent_groups), chosen_groups=fields.size("topk_group", absent_groups),
        group_score="top2",
        normalize=fields.flag("norm_topk_prob"), scale=fields.positive("routed_scaling_factor"),
    )  # fmt: skip
    return shared_experts(fields, router)


def shared_experts(fields: Fields, router: RouterSpec) -> ExpertsSpec:
    """Returns experts with `n_shared_experts` of their size that every token uses, as DeepSeek's are."""
    size = fields.size("moe_intermediate_size")
    count, shared = fields.size("n_routed_experts"), fields.count("n_shared_experts", absent=0)
    if count % router.groups or router.chosen_groups > router.groups:
        raise UserError(
            f"{fields.where}: {count} experts do not form {router.groups} groups ('n_group') of which "
            f"{router.chosen_groups} are chosen ('topk_group')."
        )
    return ExpertsSpec(
        count=count, chosen=_chosen(fields, count), size=size, activation=fields.activation("hidden_act"), bias=False,
        router=router, shared_size=size * shared if shared else None, shared_gate=False,
    )  # fmt: skip


def _experts(
    fields: Fields, count: int, size: int, normalize: bool, shared_size: int | None = None, shared_gate: bool = False
) -> ExpertsSpec:
    return ExpertsSpec(
        count=count, chosen=_chosen(fields, count), size=size, activation=fields.activation("hidden_act"), bias=False,
        router=_softmax_router(normalize), shared_size=shared_size, shared_gate=shared_gate,
    )  # fmt: skip


def _chosen(fields: Fields, count: int) -> int:
    chosen = fields.size("num_experts_per_tok")
    if chosen > count:
        raise UserError(f"{fields.where}: 'num_experts_per_tok' {chosen} is more than the {count} experts.")
    return chosen


def _softmax_router(normalize: bool, bias: bool = False) -> RouterSpec:
    return RouterSpec(
        score="softmax", bias=bias, correction=False, groups=1, chosen_groups=1, group_score="max",
        normalize=normalize, scale=1.0,
    )  # fmt: skip
