"""What train.qat makes of kernels, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.model.adapters import block_projections
from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import is_variable, path_name

LARGEST = {"int8": 127.5, "int4": 7.5}


def numpy_rounded(kernel: np.ndarray, name: str) -> np.ndarray:
    """One kernel [in, out], group after group of each column."""
    size = {"int8": len(kernel), "int4": 32}[name]
    result = np.empty_like(kernel)
    for start in range(0, len(kernel), size):
        group = kernel[start : start + size]
        scale = np.abs(group).max(axis=0) * np.float32(1.00001 / LARGEST[name])  # see _SLACK
        scale = np.where(scale == 0, np.float32(1), scale)
        limit = np.floor(LARGEST[name])
        result[start : start + size] = np.clip(np.rint(group / scale), -limit - 1, limit) * scale
    return result


def by_hand(decoder: Decoder, name: str) -> Decoder:
    """The decoder with the numbers that numpy rounds in place of the kernels of its blocks."""
    chosen = {f"{path}.kernel" for path, _ in block_projections(decoder)}

    def replace(path, leaf):
        if path_name(path) not in chosen:
            return leaf
        flat = np.asarray(leaf[...]).reshape(-1, *leaf.shape[-2:])
        return leaf.replace(jnp.asarray(np.stack([numpy_rounded(kernel, name) for kernel in flat]).reshape(leaf.shape)))

    return jax.tree_util.tree_map_with_path(replace, decoder, is_leaf=is_variable)
