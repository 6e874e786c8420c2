"""An out-of-memory error as one message with what to change."""

import contextlib
import re

import jax

from sft_jax.config import Config
from sft_jax.errors import UserError


@contextlib.contextmanager
def memory_explained(config: Config, doing: str):
    """Raises UserError with the keys to change where the devices or the host run out of memory while `doing`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        raise UserError(f"Out of memory while {doing}{_amount(text)}. {advice(config)}") from error


def advice(config: Config) -> str:
    """Returns what to change, in the order in which it costs least, leaving out what is already done."""
    micro = config.train.micro_batch_size or config.train.batch_size
    options = []
    if micro > 1:
        options.append(f"train.micro_batch_size={max(1, micro // 2)} (now {micro}; the result stays the same)")
    if config.model.remat != "full":
        options.append(f"model.remat=full (now {config.model.remat}; the result stays the same)")
    if config.model.compute_dtype == "float32":
        options.append("model.compute_dtype=bfloat16")
    options.append(f"a larger mesh.fsdp or mesh.tensor on more devices (now {config.mesh.fsdp}, {config.mesh.tensor})")
    if config.optim.name != "adafactor":
        options.append("optim.name=adafactor (its state is far smaller)")
    if config.model.dtype == "float32":
        options.append("model.dtype=bfloat16 (parameters and optimizer state)")
    options.append(f"data.max_length below {config.data.max_length}")
    return "Try, in this order: " + "; ".join(options) + "."


def _amount(text: str) -> str:
    found = re.search(r"(?:allocat\w+|used|needed)\D{0,40}?([\d.,]+\s?(?:[KMGT]i?B?|bytes))", text)
    return f" ({found.group(0)})" if found else ""
