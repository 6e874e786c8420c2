"""What every method of quantisation says of a tensor, and what it checks."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sft_jax.errors import UserError
from sft_jax.hf.files import TensorDirectory, TensorInfo

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 1 << 20  # numbers dequantised at a time, so that float32 copies stay small


class QuantisedTensor(NamedTuple):
    """A plain tensor that is stored as several others."""

    info: TensorInfo  # as it is presented; its file is that of the quantised numbers
    parts: tuple[str, ...]  # names in the files of what it is made from, and of what belongs to the format only
    read: Callable[[TensorDirectory, int, int], np.ndarray]  # (directory, first, count) -> rows, bfloat16


def presented(stored: TensorInfo, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """Returns what is told of a plain tensor whose numbers are in `stored`."""
    return TensorInfo(name, BFLOAT16, shape, stored.file, stored.start)


def check_fields(section: Mapping[str, Any], known: Mapping[str, tuple | None], where: str) -> None:
    """Raises UserError where the section has a field that is not in `known`, or a value other than listed there.

    None lists no values: the field changes no number, such as which modules were left alone, which the files show.
    """
    for name, value in section.items():
        if name not in known:
            raise UserError(f"{where}: the field '{name}' is not known for this method; known: {', '.join(known)}.")
        allowed = known[name]
        if allowed is not None and value not in allowed:
            shown = ", ".join(map(repr, allowed))
            raise UserError(f"{where}: '{name}' is {value!r:.100}, which is not read; supported: {shown}.")
