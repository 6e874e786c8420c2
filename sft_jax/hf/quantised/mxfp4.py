"""Experts in MXFP4, as GPT-OSS is published (OCP Microscaling Formats specification 1.0, section 5).

`X_blocks`, uint8 [E, out, G, 16], holds two e2m1 numbers a byte, the first in the low four bits; `X_scales`, uint8
[E, out, G], an exponent for each 32 of them. A number is its e2m1 value times 2^(scale - 127), and the plain tensor X is
[E, in = 32 G, out], as transformers' convert_moe_packed_tensors makes it.
"""

from functools import partial
from typing import Any

import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.files import TensorDirectory
from sft_jax.hf.quantised.tensors import BFLOAT16, CHUNK, QuantisedTensor, check_fields, presented

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block
_KNOWN = {"quant_method": None, "modules_to_not_convert": None, "dequantize": None}
_POSITIVE = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NUMBERS = np.concatenate([_POSITIVE, -_POSITIVE])
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=-1)  # the two numbers of a byte


def find_mxfp4(tensors: TensorDirectory, section: dict[str, Any], where: str) -> list[QuantisedTensor]:
    """Returns the tensors that are stored as blocks and scales. Raises UserError where they do not fit."""
    check_fields(section, _KNOWN, where)
    infos = tensors.tensors
    for ours, theirs in ((_BLOCKS, _SCALES), (_SCALES, _BLOCKS)):
        for name, info in infos.items():
            if name.endswith(ours) and name.removesuffix(ours) + theirs not in infos:
                raise UserError(
                    f"{info.file}: tensor '{name}' is quantised, and '{name.removesuffix(ours)}{theirs}' is missing."
                )
    found = []
    for name in [name.removesuffix(_BLOCKS) for name in infos if name.endswith(_BLOCKS)]:
        blocks, scales = infos[name + _BLOCKS], infos[name + _SCALES]
        for info in (blocks, scales):
            if info.dtype != np.uint8:
                raise UserError(f"{info.file}: tensor '{info.name}' is {info.dtype.name}; in MXFP4 it is uint8.")
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES:
            raise UserError(
                f"{blocks.file}: tensor '{blocks.name}' has the shape {list(blocks.shape)}; blocks are "
                f"[experts, out, groups, {_BYTES}]."
            )
        if scales.shape != blocks.shape[:3]:
            raise UserError(
                f"{scales.file}: tensor '{scales.name}' has the shape {list(scales.shape)}, but there are "
                f"{list(blocks.shape[:3])} blocks."
            )
        experts, out, groups, _ = blocks.shape
        info = presented(blocks, name, (experts, groups * 2 * _BYTES, out))
        found.append(QuantisedTensor(info, (blocks.name, scales.name), partial(_read, name, info.shape)))
    return found


def _read(name: str, shape: tuple[int, ...], tensors: TensorDirectory, first: int, count: int) -> np.ndarray:
    """Returns experts [first, first + count) of a tensor, [count, in, out]."""
    _, width, out = shape
    result = np.empty((count, width, out), BFLOAT16)
    step = max(1, CHUNK // width)
    for expert in range(count):
        blocks = tensors.read(name + _BLOCKS, first + expert, 1)[0]
        scales = np.ldexp(np.float32(1), tensors.read(name + _SCALES, first + expert, 1)[0].astype(np.int32) - 127)
        for start in range(0, out, step):
            part = slice(start, start + step)
            numbers = _PAIRS[blocks[part]].reshape(*scales[part].shape, 2 * _BYTES)
            with np.errstate(over="ignore"):  # beyond 2^128 it is infinite, in the reference too
                numbers *= scales[part, :, None]
            result[expert, :, part] = numbers.reshape(-1, width).astype(BFLOAT16).T
    return result
