"""Which tensor of a Hugging Face checkpoint is which parameter of the decoder, by architecture."""

from typing import Any

from sft_jax.hf.names.llama import body as llama
from sft_jax.hf.names.table import NameTable

_LLAMA = NameTable(llama)

NAMES: dict[str, NameTable] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _LLAMA,
    "Gemma3ForCausalLM": _LLAMA,
}


def name_table(config: dict[str, Any]) -> NameTable | None:
    """Returns the names of the architecture of a config.json; None where it names none that is known."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return NAMES.get(name) if isinstance(name, str) else None
