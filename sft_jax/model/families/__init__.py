"""From a checkpoint's config.json to a DecoderSpec, by architecture name."""

from collections.abc import Callable
from typing import Any

from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.families.fields import Fields
from sft_jax.model.families.gemma import gemma2, gemma3
from sft_jax.model.families.llama import llama
from sft_jax.model.families.mistral import mistral
from sft_jax.model.spec import DecoderSpec

FAMILIES: dict[str, Callable[[Fields], DecoderSpec]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
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
    fields.refuse_unsupported()
    return FAMILIES[names[0]](fields)
