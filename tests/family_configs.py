"""config.json of a tiny random model of every architecture beside those of tiny_models, all features of a family at work.

Windows are shorter than the rows of the tests, scaled ropes begin below them, and sizes differ from each other, so that
nothing that is confused or left out stays unseen. Two have a vocabulary that nothing divides, one of them a tied head.
"""

from typing import Any

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.02, "num_hidden_layers": 3, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_ROPE = {"rope_theta": 500.0, "rope_type": "default"}
_YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _config(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    values = {**_SIZES, "rope_parameters": _ROPE, **changes}
    return {"architectures": [architecture], "model_type": model_type, **values}


_LATENT = dict(num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
_DEEPSEEK = dict(
    _LATENT, n_routed_experts=8, n_shared_experts=2, moe_intermediate_size=24, num_experts_per_tok=3, first_k_dense_replace=1,
    routed_scaling_factor=1.5,
)  # fmt: skip
_GEMMA = dict(head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False)
# Caps and the scale are far smaller than in published models, so that a few random layers feel them.
_GEMMA23 = {**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 8, "query_pre_attn_scalar": 24}
_EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)
_GEMMA3_ROPES = {
    _LOCAL: {"rope_theta": 100.0, "rope_type": "default"},
    _GLOBAL: {"rope_theta": 10000.0, "rope_type": "linear", "factor": 8.0},
}
_GEMMA3 = dict(
    _GEMMA23, num_hidden_layers=7, layer_types=([_LOCAL] * 2 + [_GLOBAL]) * 2 + [_LOCAL], rope_parameters=_GEMMA3_ROPES
)

MORE_CONFIGS: dict[str, dict[str, Any]] = {
    "arcee": _config("ArceeForCausalLM", "arcee", hidden_act="relu2", head_dim=8, mlp_bias=True),
    "cohere": _config(
        "CohereForCausalLM", "cohere", layer_norm_eps=1e-5, logit_scale=0.3, tie_word_embeddings=True, attention_bias=True,
    ),
    "cohere2": _config(
        "Cohere2ForCausalLM", "cohere2", layer_norm_eps=1e-5, logit_scale=0.3, tie_word_embeddings=True, sliding_window=8,
        layer_types=[_LOCAL, _LOCAL, _GLOBAL],
    ),
    "cwm": _config(
        "CwmForCausalLM", "cwm", head_dim=12, num_hidden_layers=4, mlp_bias=True, sliding_window=8,
        layer_types=[_GLOBAL, _LOCAL, _LOCAL, _GLOBAL], rope_parameters=_LLAMA3,
    ),
    "deepseek_v2": _config(
        "DeepseekV2ForCausalLM", "deepseek_v2", **_DEEPSEEK, q_lora_rank=None, topk_method="greedy", attention_bias=True,
    ),
    "deepseek_v2_groups": _config(
        "DeepseekV2ForCausalLM", "deepseek_v2", **_DEEPSEEK, q_lora_rank=24, topk_method="group_limited_greedy", n_group=4,
        topk_group=2, rope_parameters={**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    ),
    "deepseek_v3": _config(
        "DeepseekV3ForCausalLM", "deepseek_v3", **_DEEPSEEK, q_lora_rank=24, n_group=4, topk_group=2, norm_topk_prob=True,
        rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    "dots1": _config(
        "Dots1ForCausalLM", "dots1", head_dim=12, n_routed_experts=8, n_shared_experts=2, moe_intermediate_size=24,
        num_experts_per_tok=3, first_k_dense_replace=1, routed_scaling_factor=1.5, n_group=4, topk_group=2,
        norm_topk_prob=True, attention_bias=True, sliding_window=8, max_window_layers=2,
    ),
    "ernie4_5": _config(
        "Ernie4_5ForCausalLM", "ernie4_5", head_dim=12, use_bias=True, tie_word_embeddings=True,
    ),
    "exaone4": _config(
        "Exaone4ForCausalLM", "exaone4", sliding_window=8, num_hidden_layers=4, head_dim=8,
        layer_types=[_LOCAL, _LOCAL, _LOCAL, _GLOBAL],
    ),
    "gemma": _config("GemmaForCausalLM", "gemma", **{**_GEMMA, "hidden_act": "gelu_pytorch_tanh"}),
    "glm": _config("GlmForCausalLM", "glm", head_dim=8, attention_bias=True, partial_rotary_factor=0.5),
    "glm4": _config(
        "Glm4ForCausalLM", "glm4", head_dim=8, attention_bias=True,
        rope_parameters={**_ROPE, "partial_rotary_factor": 0.5},
    ),
    "glm4_moe": _config(
        "Glm4MoeForCausalLM", "glm4_moe", head_dim=8, n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=24,
        num_experts_per_tok=3, first_k_dense_replace=1, routed_scaling_factor=1.5, n_group=1, topk_group=1,
        norm_topk_prob=True, use_qk_norm=True, attention_bias=True, partial_rotary_factor=0.5,
    ),
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_head": 4, "n_layer": 3,
        "n_inner": 56, "n_positions": 256, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    "gpt_oss": _config(
        "GptOssForCausalLM", "gpt_oss", head_dim=8, num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=3,
        sliding_window=8, layer_types=[_LOCAL, _GLOBAL] * 2, swiglu_alpha=1.3, swiglu_limit=0.6,
        rope_parameters={**_YARN, "truncate": False},
    ),
    "granite": _config(
        "GraniteForCausalLM", "granite", vocab_size=99, embedding_multiplier=3.0, logits_scaling=1.7, residual_multiplier=0.6,
        attention_multiplier=0.5, attention_bias=True, mlp_bias=True,
    ),
    "granite_moe": _config(
        "GraniteMoeForCausalLM", "granitemoe", embedding_multiplier=3.0, logits_scaling=1.7, residual_multiplier=0.6,
        attention_multiplier=0.5, num_local_experts=8, num_experts_per_tok=3,
    ),
    "granite_moe_shared": _config(
        "GraniteMoeSharedForCausalLM", "granitemoeshared", embedding_multiplier=3.0, logits_scaling=1.7,
        residual_multiplier=0.6, attention_multiplier=0.5, num_local_experts=8, num_experts_per_tok=3,
        shared_intermediate_size=40, attention_bias=True,
    ),
    "helium": _config("HeliumForCausalLM", "helium", head_dim=8, attention_bias=True, mlp_bias=True),
    "hyperclovax": _config(
        "HyperCLOVAXForCausalLM", "hyperclovax", head_dim=12, embedding_multiplier=3.0, logits_scaling=0.6,
        residual_multiplier=0.6, attention_multiplier=0.5, use_post_norm=True, attention_bias=True, mlp_bias=True,
    ),
    "hyperclovax_pre_norms": _config("HyperCLOVAXForCausalLM", "hyperclovax", head_dim=12, use_post_norm=False),
    "llama_dynamic": _config(
        "LlamaForCausalLM", "llama", max_position_embeddings=16, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True, rope_parameters=dict(_ROPE, rope_type="dynamic", factor=4.0),
    ),
    "llama_yarn": _config("LlamaForCausalLM", "llama", rope_parameters=_YARN),
    "ministral": _config(
        "MinistralForCausalLM", "ministral", head_dim=8, sliding_window=8, layer_types=[_LOCAL, _GLOBAL, _LOCAL],
    ),
    "ministral3": _config(
        "Ministral3ForCausalLM", "ministral3", head_dim=8, sliding_window=None, rope_parameters=dict(
            _YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.4, max_position_embeddings=128,
        ),
    ),
    "mixtral": _config(
        "MixtralForCausalLM", "mixtral", num_local_experts=8, num_experts_per_tok=2, sliding_window=8,
    ),
    "nemotron": _config(
        "NemotronForCausalLM", "nemotron", hidden_act="relu2", norm_eps=1e-5, head_dim=8, partial_rotary_factor=0.5,
        attention_bias=True, mlp_bias=True, num_hidden_layers=2,
    ),
    "olmo2": _config("Olmo2ForCausalLM", "olmo2", attention_bias=True),
    "olmo3": _config(
        "Olmo3ForCausalLM", "olmo3", sliding_window=8, num_hidden_layers=5,
        layer_types=[_LOCAL, _LOCAL, _LOCAL, _GLOBAL, _LOCAL], rope_parameters={_LOCAL: _ROPE, _GLOBAL: _YARN},
    ),
    "olmoe": _config("OlmoeForCausalLM", "olmoe", num_experts=8, num_experts_per_tok=3, norm_topk_prob=False),
    "phi3": _config(
        "Phi3ForCausalLM", "phi3", sliding_window=None, original_max_position_embeddings=16, rope_parameters=_LONG,
    ),
    "phi4_mini": _config(
        "Phi3ForCausalLM", "phi3", sliding_window=8, original_max_position_embeddings=16, tie_word_embeddings=True,
        rope_parameters={**_LONG, "short_factor": [1.0, 1.3], "long_factor": [1.0, 3.0], "partial_rotary_factor": 0.5},
    ),
    "qwen2": _config(
        "Qwen2ForCausalLM", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1,
        layer_types=[_GLOBAL, _LOCAL, _LOCAL],
    ),
    "qwen2_moe": _config(
        "Qwen2MoeForCausalLM", "qwen2_moe", **_EXPERTS, shared_expert_intermediate_size=40, norm_topk_prob=False,
        num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[0], qkv_bias=True, use_sliding_window=False,
    ),
    "qwen3": _config("Qwen3ForCausalLM", "qwen3", head_dim=12, tie_word_embeddings=True),
    "qwen3_moe": _config(
        "Qwen3MoeForCausalLM", "qwen3_moe", **_EXPERTS, head_dim=12, norm_topk_prob=True, mlp_only_layers=[1],
        decoder_sparse_step=1, use_sliding_window=False,
    ),
    "seed_oss": _config(
        "SeedOssForCausalLM", "seed_oss", head_dim=12, attention_bias=True, attention_out_bias=False, mlp_bias=True,
        attention_dropout=0.0, residual_dropout=0.0,
    ),
    "smollm3": _config(
        "SmolLM3ForCausalLM", "smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], use_sliding_window=True,
        sliding_window=8, layer_types=[_GLOBAL, _GLOBAL, _GLOBAL, _LOCAL], tie_word_embeddings=True,
    ),
    "stablelm": _config(
        "StableLmForCausalLM", "stablelm", layer_norm_eps=1e-5, partial_rotary_factor=0.5, use_qkv_bias=True,
    ),
    "starcoder2": _config(
        "Starcoder2ForCausalLM", "starcoder2", hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-5, use_bias=True,
        sliding_window=8, tie_word_embeddings=True, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0,
    ),
    "vault_gemma": _config(
        "VaultGemmaForCausalLM", "vaultgemma", **{**_GEMMA23, "attention_bias": True}, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0, layer_types=[_LOCAL, _GLOBAL, _LOCAL],
    ),
    "youtu": _config(
        "YoutuForCausalLM", "youtu", **_LATENT, q_lora_rank=24, attention_bias=True, tie_word_embeddings=True,
        rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    "youtu_halves": _config("YoutuForCausalLM", "youtu", **_LATENT, q_lora_rank=None, rope_interleave=False),
}  # fmt: skip
MORE_CONFIGS["gemma3_multimodal"] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "tie_word_embeddings": True,
    "mm_tokens_per_image": 4, "image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93,
    "text_config": {"model_type": "gemma3_text", **_SIZES, **_GEMMA3},
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
}  # fmt: skip
for _name in ("cohere", "cohere2", "nemotron", "stablelm", "starcoder2"):
    del MORE_CONFIGS[_name]["rms_norm_eps"]
