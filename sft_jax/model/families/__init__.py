"""From a checkpoint's config.json to a DecoderSpec, by architecture name."""

from collections.abc import Callable
from typing import Any

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.families.cohere import cohere, cohere2
from sft_jax.model.families.deepseek import deepseek2, deepseek3, youtu
from sft_jax.model.families.exaone import exaone4
from sft_jax.model.families.experts import (
    dots1,
    glm4_moe,
    gpt_oss,
    granite_moe,
    granite_moe_shared,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from sft_jax.model.families.fields import Fields
from sft_jax.model.families.gemma import gemma, gemma2, gemma3, gemma3_multimodal, vault_gemma
from sft_jax.model.families.glm import glm, glm4
from sft_jax.model.families.layer_norm import gpt2, nemotron, stablelm, starcoder2
from sft_jax.model.families.llama import arcee, ernie4_5, granite, helium, hyperclovax, llama, seed_oss, smollm3
from sft_jax.model.families.mistral import cwm, ministral, ministral3, mistral
from sft_jax.model.families.olmo import olmo2, olmo3
from sft_jax.model.families.phi import phi3
from sft_jax.model.families.qwen import qwen2, qwen3
from sft_jax.model.spec import DecoderSpec

FAMILIES: dict[str, Callable[[Fields], DecoderSpec]] = {
    "ArceeForCausalLM": arcee,
    "Cohere2ForCausalLM": cohere2,
    "CohereForCausalLM": cohere,
    "CwmForCausalLM": cwm,
    "DeepseekV2ForCausalLM": deepseek2,
    "DeepseekV3ForCausalLM": deepseek3,
    "Dots1ForCausalLM": dots1,
    "Ernie4_5ForCausalLM": ernie4_5,
    "Exaone4ForCausalLM": exaone4,
    "GPT2LMHeadModel": gpt2,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Gemma3ForConditionalGeneration": gemma3_multimodal,
    "GemmaForCausalLM": gemma,
    "Glm4ForCausalLM": glm4,
    "Glm4MoeForCausalLM": glm4_moe,
    "GlmForCausalLM": glm,
    "GptOssForCausalLM": gpt_oss,
    "GraniteForCausalLM": granite,
    "GraniteMoeForCausalLM": granite_moe,
    "GraniteMoeSharedForCausalLM": granite_moe_shared,
    "HeliumForCausalLM": helium,
    "HyperCLOVAXForCausalLM": hyperclovax,
    "LlamaForCausalLM": llama,
    "Ministral3ForCausalLM": ministral3,
    "MinistralForCausalLM": ministral,
    "MistralForCausalLM": mistral,
    "MixtralForCausalLM": mixtral,
    "NemotronForCausalLM": nemotron,
    "Olmo2ForCausalLM": olmo2,
    "Olmo3ForCausalLM": olmo3,
    "OlmoeForCausalLM": olmoe,
    "Phi3ForCausalLM": phi3,
    "Qwen2ForCausalLM": qwen2,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "SeedOssForCausalLM": seed_oss,
    "SmolLM3ForCausalLM": smollm3,
    "StableLmForCausalLM": stablelm,
    "Starcoder2ForCausalLM": starcoder2,
    "VaultGemmaForCausalLM": vault_gemma,
    "YoutuForCausalLM": youtu,
}


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """Returns the spec of the model that `config`, a parsed config.json, describes.

    Takes the form that transformers writes from version 5 on (`rope_parameters`, `layer_types`) and the one before.
    Raises UserError naming the architecture or the field where it is unknown, missing or not supported.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"config.json: 'architectures' must name the model class; supported: {known}.")
    if names[0] not in FAMILIES:
        raise UserError(f"config.json: architecture '{names[0]}' is not supported; {did_you_mean(names[0], FAMILIES)}.")
    fields = Fields(config)
    spec = FAMILIES[names[0]](fields)
    fields.refuse_unsupported()
    return spec
