"""Checkpoints whose files hold quantised tensors, read as the plain bfloat16 model that they stand for.

Training needs the numbers, and an export is a plain model, so the rest of the package never sees the format: tensors
come out under the names and in the shapes of the model's unquantised checkpoint, dequantised a range of rows at a time
as they are read, and `quantization_config` is taken out of config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.errors import UserError, did_you_mean
from sft_jax.hf.files import CONFIG, TensorDirectory, open_tensors, read_json
from sft_jax.hf.quantised.fp8 import find_fp8
from sft_jax.hf.quantised.mxfp4 import find_mxfp4
from sft_jax.hf.quantised.tensors import QuantisedTensor

_SECTION = "quantization_config"

# `quant_method` -> what a directory with this section presents: from the headers, before a tensor is read.
METHODS: dict[str, Callable[[TensorDirectory, dict[str, Any], str], list[QuantisedTensor]]] = {
    "fp8": find_fp8,
    "mxfp4": find_mxfp4,
}


@dataclass(frozen=True)
class QuantisedDirectory(TensorDirectory):
    """The tensors of a directory, those that are quantised presented as plain ones."""

    stored: TensorDirectory  # as they are in the files
    quantised: dict[str, QuantisedTensor]

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        if name not in self.quantised:
            return self.stored.read(name, first, count)
        tensor = self.quantised[name]
        return tensor.read(self.stored, first, tensor.info.shape[0] - first if count is None else count)


def open_model(folder: str | Path) -> TensorDirectory:
    """Reads the headers of a model's directory, as `open_tensors` does, and presents quantised tensors as plain ones.

    Raises UserError also where config.json names a method that is not read, or tensors do not fit the method.
    """
    tensors = open_tensors(folder)
    config = Path(folder) / CONFIG
    section = read_json(config).get(_SECTION) if config.is_file() else None
    if section is None:
        return tensors
    found = METHODS[_method(section, str(config))](tensors, section, f"{config}: {_SECTION}")
    hidden = {part for tensor in found for part in tensor.parts}
    plain = {name: info for name, info in tensors.tensors.items() if name not in hidden}
    quantised = {tensor.info.name: tensor for tensor in found}
    for name in plain.keys() & quantised.keys():
        raise UserError(f"{plain[name].file}: holds tensor '{name}' both plain and quantised; remove one of them.")
    presented = plain | {name: tensor.info for name, tensor in quantised.items()}
    return QuantisedDirectory(tensors.folder, presented, tensors, quantised)


def plain_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns config.json of the model as it is presented: without the section, in bfloat16 where it names no dtype.

    Raises UserError beginning with `where` for a method that is not read.
    """
    if config.get(_SECTION) is None:
        return config
    _method(config[_SECTION], where)
    plain = {name: value for name, value in config.items() if name != _SECTION}
    return plain if plain.keys() & {"dtype", "torch_dtype"} else plain | {"torch_dtype": "bfloat16"}


def _method(section: Any, where: str) -> str:
    method = section.get("quant_method") if isinstance(section, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(
            f"{where}: {_SECTION}: the method {method!r} is not read; {did_you_mean(str(method), METHODS)}. Take the "
            "checkpoint that is not quantised, or dequantise it with the library that it was made with."
        )
    return method
