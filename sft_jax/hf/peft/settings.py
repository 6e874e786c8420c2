"""adapter_config.json: what of it decides the numbers of an adapter, and what is not computed here."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_jax.errors import UserError
from sft_jax.hf.files import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Beginnings of `init_lora_weights` that change the base, so that the adapter does not belong to the base itself.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields that say how an adapter was made, for whom, or where; the tensors say the rest.
_OF_NO_EFFECT = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora",
    "qalora_group_size", "runtime_config", "target_parameters", "ensure_weight_tying",
}  # fmt: skip

_MERGE_THERE = "merge it into its base with the library that has made it, and name that model"
_NUMBERS = {
    "r": lambda value: isinstance(value, int) and value >= 1,
    "lora_alpha": math.isfinite,
    "lora_dropout": lambda value: 0 <= value < 1,
}


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says that matters here."""

    where: str  # the file, for messages
    base: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    dropout: float
    rslora: bool
    dora: bool
    tokens: list[int] | Mapping[str, list[int]] | None  # whose rows are trained: of the embedding, or by module
    tied: bool  # what is changed of an embedding is changed of a head that is tied to it, although the file has it once
    parameters: tuple[str, ...]  # that carry adapters although they are no modules

    def scale(self, module: str, rank: int) -> float:
        """Returns what the product of a module's matrices is multiplied by, which have this rank in the file."""
        expected = _of_pattern(self.rank_pattern, module, self.rank)
        if rank != expected:
            raise UserError(
                f"{self.where}: gives {module} the rank {expected} (r, rank_pattern), but its tensors have {rank}; config and "
                "tensors must be of the same adapter."
            )
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def is_adapter_directory(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_settings(folder: Path) -> Settings:
    """Reads adapter_config.json of a directory. Raises UserError naming the field that is wrong or not computed here."""
    path = folder / CONFIG
    values = read_json(path)

    def wrong(name: str, why: str) -> UserError:
        return UserError(f"{path}: {name} is {values.get(name)!r:.200}, {why}.")

    if values.get("peft_type") != "LORA":
        raise wrong("peft_type", f"and only adapters of type LORA are read, DoRA among them; {_MERGE_THERE}")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise wrong("task_type", "and only adapters of causal language models (CAUSAL_LM) are read; name one of those")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CHANGE_THE_BASE):
        raise wrong(
            "init_lora_weights",
            "which changes the base too, so the adapter alone is not enough; save it converted (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)",
        )
    for name, value in values.items():
        if name not in _OF_NO_EFFECT and value:
            raise wrong(name, f"which is not computed here, and without it this would be another adapter; {_MERGE_THERE}")
    for name, fits in _NUMBERS.items():
        value = values.get(name, 0.0 if name == "lora_dropout" else None)
        if type(value) not in (int, float) or not fits(value):
            raise wrong(name, "which is no number that it can be; restore the file as it was saved")
    ranks, alphas = (values.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    for name, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(patterns, dict) or not all(isinstance(value, int | float) for value in patterns.values()):
            raise wrong(name, "which maps no patterns to numbers; restore the file as it was saved")
        for pattern in patterns:
            _compiled(pattern, path, name)
    tokens = values.get("trainable_token_indices")
    lists = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
    if not all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in lists):
        raise wrong("trainable_token_indices", "which is no list of token ids, nor such lists by module; restore the file as it was saved")
    base = values.get("base_model_name_or_path")
    return Settings(
        str(path), base if isinstance(base, str) and base else None, values["r"], float(values["lora_alpha"]), ranks, alphas,
        float(values.get("lora_dropout", 0.0)), bool(values.get("use_rslora")), bool(values.get("use_dora")), tokens,
        bool(values.get("ensure_weight_tying")), tuple(values.get("target_parameters") or ()),
    )  # fmt: skip


def _compiled(pattern: str, path: Path, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{path}: {name} holds '{pattern}', which is no regular expression: {error}.") from error


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that is the end of a module's name, as PEFT does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
