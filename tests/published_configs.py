"""config.json of a published model of every architecture, without what does not reach the decoder, and its parameters."""

from typing import Any

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _sizes(vocab, hidden, inner, layers, heads, kv_heads, head=None, **rest) -> dict[str, Any]:
    sizes = dict(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, hidden_act="silu", max_position_embeddings=32768, initializer_range=0.02,
    )  # fmt: skip
    return {**sizes, **({"head_dim": head} if head else {}), **rest}


def _rms(*sizes, epsilon=1e-5, **rest) -> dict[str, Any]:
    return _sizes(*sizes, rms_norm_eps=epsilon, **rest)


_LLAMA3_SCALING = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_DEEPSEEK_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_GEMMA = dict(hidden_activation="gelu_pytorch_tanh", epsilon=1e-6, rope_theta=10000.0)
_GEMMA3_TEXT = _rms(
    262144, 1152, 6912, 26, 4, 1, 256, **{**_GEMMA, "rope_theta": 1000000}, rope_local_base_freq=10000, sliding_window=512,
    sliding_window_pattern=6, query_pre_attn_scalar=256, attn_logit_softcapping=None, final_logit_softcapping=None,
)  # fmt: skip

# architecture -> (model, config, parameters; None where the published count is of more than the decoder, or not known)
PUBLISHED: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "ArceeForCausalLM": ("arcee-ai/AFM-4.5B", _rms(
        128004, 2560, 18432, 36, 20, 4, 128, hidden_act="relu2", rope_theta=10000.0), None),
    "Cohere2ForCausalLM": ("CohereForAI/c4ai-command-r7b-12-2024", _sizes(
        256000, 4096, 14336, 32, 32, 8, layer_norm_eps=1e-5, logit_scale=0.25, sliding_window=4096, sliding_window_pattern=4,
        rope_theta=50000), 8_028_033_024),
    "CohereForCausalLM": ("CohereForAI/c4ai-command-r-v01", _sizes(
        256000, 8192, 22528, 40, 64, 64, layer_norm_eps=1e-5, logit_scale=0.0625, rope_theta=8000000.0), 34_980_831_232),
    "CwmForCausalLM": ("facebook/cwm", _rms(
        128256, 6144, 21504, 64, 48, 8, 128, mlp_bias=False, sliding_window=8192, layer_types=([_GLOBAL] + [_LOCAL] * 3) * 16,
        rope_theta=1000000.0, rope_scaling={**_LLAMA3_SCALING, "factor": 16.0}), None),
    "DeepseekV2ForCausalLM": ("deepseek-ai/DeepSeek-V2-Lite", _rms(
        102400, 2048, 10944, 27, 16, 16, epsilon=1e-6, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2, moe_intermediate_size=1408,
        num_experts_per_tok=6, first_k_dense_replace=1, routed_scaling_factor=1.0, topk_method="greedy", n_group=1,
        topk_group=1, scoring_func="softmax", norm_topk_prob=False, moe_layer_freq=1, rope_theta=10000,
        rope_scaling={**_DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}), 15_706_484_224),
    "DeepseekV3ForCausalLM": ("deepseek-ai/DeepSeek-V3", _rms(
        129280, 7168, 18432, 61, 128, 128, epsilon=1e-6, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1, moe_intermediate_size=2048,
        num_experts_per_tok=8, first_k_dense_replace=3, routed_scaling_factor=2.5, topk_method="noaux_tc", n_group=8,
        topk_group=4, scoring_func="sigmoid", norm_topk_prob=True, moe_layer_freq=1, rope_theta=10000,
        num_nextn_predict_layers=1, rope_scaling={**_DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}), 671_026_419_200),
    "Dots1ForCausalLM": ("rednote-hilab/dots.llm1.base", _rms(
        152064, 4096, 10944, 62, 32, 32, n_routed_experts=128, n_shared_experts=2, moe_intermediate_size=1408,
        num_experts_per_tok=6, first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True, n_group=None,
        topk_group=None, scoring_func="noaux_tc", attention_bias=False, sliding_window=None, max_window_layers=62,
        rope_theta=10000000), 142_774_381_696),
    "Ernie4_5ForCausalLM": ("baidu/ERNIE-4.5-0.3B-PT", _rms(
        103424, 1024, 3072, 18, 16, 2, 128, use_bias=False, rope_theta=500000.0, tie_word_embeddings=True), 360_748_032),
    "Exaone4ForCausalLM": ("LGAI-EXAONE/EXAONE-4.0-1.2B", _rms(
        102400, 2048, 4096, 30, 32, 8, 64, sliding_window=None, layer_types=[_GLOBAL] * 30, rope_theta=1000000,
        tie_word_embeddings=True), 1_279_391_488),
    "GPT2LMHeadModel": ("openai-community/gpt2", dict(
        vocab_size=50257, n_embd=768, n_head=12, n_layer=12, n_positions=1024, activation_function="gelu_new",
        layer_norm_epsilon=1e-5, initializer_range=0.02), 124_439_808),
    "Gemma2ForCausalLM": ("google/gemma-2-2b", _rms(
        256000, 2304, 9216, 26, 8, 4, 256, **_GEMMA, sliding_window=4096, query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0), 2_614_341_888),
    "Gemma3ForCausalLM": ("google/gemma-3-1b-pt", _GEMMA3_TEXT, 999_885_952),
    "Gemma3ForConditionalGeneration": ("google/gemma-3-4b-pt", dict(text_config={
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}), None),
    "GemmaForCausalLM": ("google/gemma-2b", _rms(
        256000, 2048, 16384, 18, 8, 1, 256, epsilon=1e-6, hidden_act="gelu", rope_theta=10000.0), 2_506_172_416),
    "Glm4ForCausalLM": ("THUDM/GLM-4-9B-0414", _rms(
        151552, 4096, 13696, 40, 32, 2, 128, attention_bias=True, partial_rotary_factor=0.5, rope_theta=10000.0),
        9_400_279_040),
    "Glm4MoeForCausalLM": ("zai-org/GLM-4.5-Air", _rms(
        151552, 4096, 10944, 46, 96, 8, 128, attention_bias=True, partial_rotary_factor=0.5, rope_theta=1000000,
        n_routed_experts=128, n_shared_experts=1, moe_intermediate_size=1408, num_experts_per_tok=8, first_k_dense_replace=1,
        routed_scaling_factor=1.0, n_group=1, topk_group=1, norm_topk_prob=True, use_qk_norm=False), None),
    "GlmForCausalLM": ("THUDM/glm-4-9b-chat-hf", _rms(
        151552, 4096, 13696, 40, 32, 2, 128, epsilon=1.5625e-7, attention_bias=True, rope_theta=10000.0), 9_399_951_360),
    "GptOssForCausalLM": ("openai/gpt-oss-20b", _rms(
        201088, 2880, 2880, 24, 64, 8, 64, num_local_experts=32, num_experts_per_tok=4, sliding_window=128, swiglu_limit=7.0,
        attention_bias=True, rope_theta=150000, rope_scaling={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        }), 20_914_757_184),
    "GraniteForCausalLM": ("ibm-granite/granite-3.1-8b-base", _rms(
        49155, 4096, 12800, 40, 32, 8, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0078125,
        logits_scaling=16.0, rope_theta=10000000.0, tie_word_embeddings=True), 8_170_848_256),
    "GraniteMoeForCausalLM": ("ibm-granite/granite-3.1-1b-a400m-base", _rms(
        49155, 1024, 512, 24, 16, 8, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625,
        logits_scaling=6.0, num_local_experts=32, num_experts_per_tok=8, rope_theta=1500000.0, tie_word_embeddings=True), None),
    "GraniteMoeSharedForCausalLM": ("the sizes of ibm-granite/granite-3.1-1b-a400m-base, with a shared MLP", _rms(
        49155, 1024, 512, 24, 16, 8, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625,
        logits_scaling=6.0, num_local_experts=32, num_experts_per_tok=8, shared_intermediate_size=1024, rope_theta=1500000.0,
        tie_word_embeddings=True), None),
    "HeliumForCausalLM": ("kyutai/helium-1-preview-2b", _rms(
        48000, 2560, 7040, 24, 20, 20, 128, epsilon=1e-8, rope_theta=100000.0), 2_172_643_840),
    "HyperCLOVAXForCausalLM": ("naver-hyperclovax/HyperCLOVAX-SEED-Think-14B", _rms(
        110592, 6144, 14336, 38, 48, 8, 128, embedding_multiplier=10.0, residual_multiplier=1.0,
        attention_multiplier=0.0078125, logits_scaling=0.125, use_post_norm=True, rope_theta=100000000), 14_748_112_896),
    "LlamaForCausalLM": ("meta-llama/Llama-3.2-1B", _rms(
        128256, 2048, 8192, 16, 32, 8, 64, rope_theta=500000.0, tie_word_embeddings=True,
        rope_scaling={**_LLAMA3_SCALING, "factor": 32.0}), 1_235_814_400),
    "Ministral3ForCausalLM": ("the text model of mistralai/Ministral-3-8B-Base-2512", _rms(
        131072, 4096, 14336, 34, 32, 8, 128, sliding_window=None, rope_parameters={
            "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        }), None),
    "MinistralForCausalLM": ("mistralai/Ministral-8B-Instruct-2410", _rms(
        131072, 4096, 12288, 36, 32, 8, 128, sliding_window=32768, rope_theta=100000000.0,
        layer_types=([_GLOBAL] + [_LOCAL] * 3) * 9), 8_019_808_256),
    "MistralForCausalLM": ("mistralai/Mistral-7B-v0.1", _rms(
        32000, 4096, 14336, 32, 32, 8, sliding_window=4096, rope_theta=10000.0), 7_241_732_096),
    "MixtralForCausalLM": ("mistralai/Mixtral-8x7B-v0.1", _rms(
        32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
        rope_theta=1000000.0), 46_702_792_704),
    "NemotronForCausalLM": ("nvidia/Minitron-4B-Base", _sizes(
        256000, 3072, 9216, 32, 24, 8, 128, hidden_act="relu2", norm_eps=1e-5, rope_theta=10000.0), None),
    "Olmo2ForCausalLM": ("allenai/OLMo-2-1124-7B", _rms(
        100352, 4096, 11008, 32, 32, 32, epsilon=1e-6, rope_theta=500000), 7_298_617_344),
    "Olmo3ForCausalLM": ("allenai/Olmo-3-1025-7B", _rms(
        100278, 4096, 11008, 32, 32, 32, epsilon=1e-6, sliding_window=4096, rope_theta=500000, rope_scaling={
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1,
            "attention_factor": 1.2079441541679836,
        }), 7_298_011_136),
    "OlmoeForCausalLM": ("allenai/OLMoE-1B-7B-0924", _rms(
        50304, 2048, 1024, 16, 16, 16, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, rope_theta=10000.0),
        6_919_161_856),
    "Phi3ForCausalLM": ("microsoft/Phi-3-mini-4k-instruct", _rms(
        32064, 3072, 8192, 32, 32, 32, sliding_window=2047, rope_theta=10000.0, rope_scaling=None,
        original_max_position_embeddings=4096), 3_821_079_552),
    "Qwen2ForCausalLM": ("Qwen/Qwen2.5-7B", _rms(
        152064, 3584, 18944, 28, 28, 4, epsilon=1e-6, rope_theta=1000000.0, use_sliding_window=False, sliding_window=131072,
        max_window_layers=28), 7_615_616_512),
    "Qwen2MoeForCausalLM": ("Qwen/Qwen1.5-MoE-A2.7B", _rms(
        151936, 2048, 5632, 24, 16, 16, epsilon=1e-6, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, norm_topk_prob=False, decoder_sparse_step=1, use_sliding_window=False,
        rope_theta=1000000.0), 14_315_784_192),
    "Qwen3ForCausalLM": ("Qwen/Qwen3-8B", _rms(
        151936, 4096, 12288, 36, 32, 8, 128, epsilon=1e-6, rope_theta=1000000, use_sliding_window=False), 8_190_735_360),
    "Qwen3MoeForCausalLM": ("Qwen/Qwen3-30B-A3B", _rms(
        151936, 2048, 6144, 48, 32, 4, 128, epsilon=1e-6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], rope_theta=1000000.0, use_sliding_window=False),
        30_532_122_624),
    "SeedOssForCausalLM": ("ByteDance-Seed/Seed-OSS-36B-Instruct", _rms(
        155136, 5120, 27648, 64, 80, 8, 128, epsilon=1e-6, attention_bias=True, attention_out_bias=False,
        attention_dropout=0.1, residual_dropout=0.1, rope_theta=10000000.0, rope_scaling={"rope_type": "default"}),
        36_151_104_512),
    "SmolLM3ForCausalLM": ("HuggingFaceTB/SmolLM3-3B", _rms(
        128256, 2048, 11008, 36, 16, 4, epsilon=1e-6, no_rope_layers=[1, 1, 1, 0] * 9, use_sliding_window=False,
        sliding_window=None, rope_theta=5000000.0, tie_word_embeddings=True), 3_075_098_624),
    "StableLmForCausalLM": ("stabilityai/stablelm-2-1_6b", _sizes(
        100352, 2048, 5632, 24, 32, 32, layer_norm_eps=1e-5, partial_rotary_factor=0.25, use_qkv_bias=True,
        use_parallel_residual=False, qk_layernorm=False, rope_theta=10000), 1_644_515_328),
    "Starcoder2ForCausalLM": ("bigcode/starcoder2-3b", _sizes(
        49152, 3072, 12288, 30, 24, 2, hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-5, use_bias=True, sliding_window=4096,
        rope_theta=999999.4420358813, tie_word_embeddings=True), 3_030_371_328),
    "VaultGemmaForCausalLM": ("google/vaultgemma-1b", _rms(
        256000, 1152, 6912, 26, 4, 4, 256, **_GEMMA, sliding_window=512, layer_types=[_GLOBAL] * 26,
        query_pre_attn_scalar=256, attn_logit_softcapping=None, final_logit_softcapping=None), 1_038_741_120),
    "YoutuForCausalLM": ("tencent/Youtu-LLM-2B", _rms(
        128256, 2048, 6144, 32, 16, 16, epsilon=1e-6, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, rope_interleave=True, attention_bias=False, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1600000, "rope_type": "default"}), 1_961_560_064),
}  # fmt: skip


def published_config(architecture: str) -> dict[str, Any]:
    return {"architectures": [architecture], **PUBLISHED[architecture][1]}
