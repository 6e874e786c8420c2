"""Which tensor of a Hugging Face checkpoint is which parameter of the decoder, by architecture."""

from typing import Any

from sft_jax.hf.names.parts import (
    BOTH_NORMS,
    attention,
    body,
    experts,
    gpt_oss_experts,
    granite_experts,
    latent_attention,
    mlp,
)
from sft_jax.hf.names.table import INVERSE_FREQUENCIES, NameTable, Root

_LLAMA = NameTable(body())
_POST_NORMS = {ours: theirs for ours, theirs in BOTH_NORMS.items() if ours.startswith("post")}
_GLM4_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_mlp_layernorm",
}
_CLOVA_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_norm1",
    "mlp_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_norm2",
}
_ONE_NORM = NameTable(body({"attention_norm": "input_layernorm"}))
_TWO_NORMS = NameTable(body(_POST_NORMS))
_FOUR_NORMS = NameTable(body(BOTH_NORMS))
_GRANITE_MOE = NameTable(body(mlp=granite_experts), modules=((r"\.router\.layer\.", ".router."),))
_FUSED_MLP = mlp(fused="gate_up_proj")
_SHARED = (mlp(), experts(shared="shared_experts"))
_GPT2_MLP = {"up": "c_fc", "down": "c_proj"}
_MIXTRAL_MLP = {"gate": "w1", "up": "w3", "down": "w2"}
# The layers behind the last, which predict a second token and are not part of the decoder.
_WITHOUT_FURTHER_LAYERS = (INVERSE_FREQUENCIES, r"layers\.{layers}\..*")

NAMES: dict[str, NameTable] = {
    "ArceeForCausalLM": _LLAMA,
    "Cohere2ForCausalLM": _ONE_NORM,
    "CohereForCausalLM": _ONE_NORM,
    "CwmForCausalLM": _LLAMA,
    "DeepseekV2ForCausalLM": NameTable(body(attention=latent_attention, mlp=_SHARED)),
    "DeepseekV3ForCausalLM": NameTable(body(attention=latent_attention, mlp=_SHARED), ignored=_WITHOUT_FURTHER_LAYERS),
    "Dots1ForCausalLM": NameTable(body(mlp=_SHARED)),
    "Ernie4_5ForCausalLM": _LLAMA,
    "Exaone4ForCausalLM": _TWO_NORMS,
    "GPT2LMHeadModel": NameTable(
        body(
            {"attention_norm": "ln_1", "mlp_norm": "ln_2"},
            attention("attn", "c_proj", fused="c_attn", transpose=False),
            mlp(names=_GPT2_MLP, transpose=False),
            layer="h.{layer}.",
            embedding="wte.weight",
            positions="wpe.weight",
            final_norm="ln_f",
        ),
        roots=(Root("transformer.", "lm_head.weight"), Root("", "lm_head.weight")),  # published files lack the first
        embedding="wte.weight",
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask
    ),
    "Gemma2ForCausalLM": _FOUR_NORMS,
    "Gemma3ForCausalLM": _FOUR_NORMS,
    "Gemma3ForConditionalGeneration": NameTable(
        body(BOTH_NORMS),
        roots=(
            Root("language_model.model.", "language_model.lm_head.weight"),
            Root("model.language_model.", "lm_head.weight"),
        ),
        modules=((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head")),
        carried=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
    ),
    "GemmaForCausalLM": _LLAMA,
    "Glm4ForCausalLM": NameTable(body(_GLM4_NORMS, mlp=_FUSED_MLP)),
    "Glm4MoeForCausalLM": NameTable(body(mlp=_SHARED), ignored=_WITHOUT_FURTHER_LAYERS),
    "GlmForCausalLM": NameTable(body(mlp=_FUSED_MLP)),
    "GptOssForCausalLM": NameTable(body(mlp=gpt_oss_experts)),
    "GraniteForCausalLM": _LLAMA,
    "GraniteMoeForCausalLM": _GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": _GRANITE_MOE,
    "HeliumForCausalLM": _LLAMA,
    "HyperCLOVAXForCausalLM": NameTable(body(_CLOVA_NORMS)),
    "LlamaForCausalLM": _LLAMA,
    "Ministral3ForCausalLM": _LLAMA,
    "MinistralForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": NameTable(
        body(mlp=experts("block_sparse_moe", names=_MIXTRAL_MLP)), modules=((r"\.block_sparse_moe\.", ".mlp."),)
    ),
    "NemotronForCausalLM": _LLAMA,
    "Olmo2ForCausalLM": _TWO_NORMS,
    "Olmo3ForCausalLM": _TWO_NORMS,
    "OlmoeForCausalLM": NameTable(body(mlp=experts())),
    "Phi3ForCausalLM": NameTable(body(attention=attention(fused="qkv_proj"), mlp=_FUSED_MLP)),
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen2MoeForCausalLM": NameTable(
        body(mlp=(mlp(), experts(shared="shared_expert", shared_gate="shared_expert_gate")))
    ),
    "Qwen3ForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": NameTable(body(mlp=(mlp(), experts()))),
    "SeedOssForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": _LLAMA,
    "StableLmForCausalLM": _LLAMA,
    "Starcoder2ForCausalLM": NameTable(body(mlp=mlp(names=_GPT2_MLP))),
    "VaultGemmaForCausalLM": _FOUR_NORMS,
    "YoutuForCausalLM": NameTable(body(attention=latent_attention)),
}


def name_table(config: dict[str, Any]) -> NameTable | None:
    """Returns the names of the architecture of a config.json; None where it names none that is known."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return NAMES.get(name) if isinstance(name, str) else None
