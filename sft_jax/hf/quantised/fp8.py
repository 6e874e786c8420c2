"""Weights in float8 (e4m3) with a scale for each block, as DeepSeek-V3, Qwen3-FP8 and Ministral 3 are published.

`X.weight` [out, in] is stored beside `X.weight_scale_inv`, float32 or bfloat16: [ceil(out / m), ceil(in / n)] for blocks
of `weight_block_size` [m, n], or one number for the whole tensor where that is null. The weight is the float8 number
times its scale (DeepSeek-V3's inference/kernel.py, weight_dequant), computed in float32. `X.activation_scale` of the
static scheme scales activations for float8 arithmetic alone, and is left out.
"""

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.files import TensorDirectory
from sft_jax.hf.quantised.tensors import BFLOAT16, CHUNK, QuantisedTensor, check_fields, presented

_SCALE = "_scale_inv"
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_NUMBERS = np.arange(256, dtype=np.uint8).view(_FLOAT8).astype(np.float32)  # by their byte: faster than a cast
_KNOWN = {
    "quant_method": None,
    "weight_block_size": None,  # checked below
    "activation_scheme": ("dynamic", "static"),
    "fmt": ("e4m3",),
    "scale_fmt": ("float", "ue8m0"),  # the scales have a dtype of their own
    "expert_dtype": ("fp8",),
    "dequantize": None,
    "modules_to_not_convert": None,
    "modules_to_convert": None,
    "ignored_layers": None,
}


def find_fp8(tensors: TensorDirectory, section: dict[str, Any], where: str) -> list[QuantisedTensor]:
    """Returns the tensors that are stored as float8 and scales. Raises UserError where they do not fit."""
    check_fields(section, _KNOWN, where)
    block = _block_size(section, where)
    infos = tensors.tensors
    for name, info in infos.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) not in infos:
            raise UserError(f"{info.file}: tensor '{name}' is a scale of no tensor '{name.removesuffix(_SCALE)}'.")
    found = []
    for name, info in infos.items():
        if name.endswith(_SCALE) or info.dtype != _FLOAT8 and name + _SCALE not in infos:
            continue
        scale = infos.get(name + _SCALE)
        if scale is None:
            raise UserError(f"{info.file}: tensor '{name}' is float8, and its scale '{name}{_SCALE}' is missing.")
        if info.dtype != _FLOAT8:
            raise UserError(f"{info.file}: tensor '{name}' has a scale, but is {info.dtype.name} and not float8 (e4m3).")
        if len(info.shape) != 2:
            raise UserError(
                f"{info.file}: tensor '{name}' is float8 and has the shape {list(info.shape)}, which is no matrix."
            )
        _check_scale(scale, info.shape, block)
        parts = [name, scale.name]
        if section.get("activation_scheme") == "static":
            parts.append(name.removesuffix("weight") + "activation_scale")
        read = partial(_read, name, info.shape[1], block)
        found.append(QuantisedTensor(presented(info, name, info.shape), tuple(parts), read))
    return found


def _block_size(section: dict[str, Any], where: str) -> tuple[int, int] | None:
    block = section.get("weight_block_size", [128, 128])  # what transformers takes where it is left out
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise UserError(f"{where}: 'weight_block_size' is {block!r:.100}; it must be two whole numbers, or null.")
    return block[0], block[1]


def _check_scale(scale, shape: tuple[int, ...], block: tuple[int, int] | None) -> None:
    if scale.dtype.name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{scale.file}: tensor '{scale.name}' is {scale.dtype.name}; scales are float32 or bfloat16.")
    expected = ((), (1,), (1, 1)) if block is None else (tuple(-(-size // b) for size, b in zip(shape, block)),)
    if scale.shape not in expected:
        raise UserError(
            f"{scale.file}: tensor '{scale.name}' has the shape {list(scale.shape)}, but {list(expected[0])} is what a "
            f"weight of {list(shape)} has in {'one piece' if block is None else f'blocks of {list(block)}'}."
        )


def _read(
    name: str, width: int, block: tuple[int, int] | None, tensors: TensorDirectory, first: int, count: int
) -> np.ndarray:
    """Returns rows [first, first + count) of a weight."""
    stored = tensors.read(name, first, count).view(np.uint8)
    rows = np.empty((count, width), BFLOAT16)
    if block is None:
        scale = tensors.read(name + _SCALE).astype(np.float32).reshape(())
        step = max(1, CHUNK // max(1, width))
        for start in range(0, count, step):
            rows[start : start + step] = (_NUMBERS[stored[start : start + step]] * scale).astype(BFLOAT16)
        return rows
    height, columns = block
    top, bottom = first // height, -(-(first + count) // height)
    scales = tensors.read(name + _SCALE, top, bottom - top).astype(np.float32)
    for number, scale in enumerate(scales, top):
        part = slice(max(number * height - first, 0), min((number + 1) * height - first, count))
        rows[part] = (_NUMBERS[stored[part]] * np.repeat(scale, columns)[:width]).astype(BFLOAT16)
    return rows
