"""An out-of-memory error as one message with what to change."""

import contextlib
import re
from collections.abc import Iterator
from typing import Literal

import jax
from jax.sharding import Mesh

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.model.attention import platform_of
from sft_jax.model.sharding import pieces_along

Doing = Literal["loading the model", "training", "evaluating", "exporting"]


@contextlib.contextmanager
def memory_explained(config: Config, mesh: Mesh, doing: Doing) -> Iterator[None]:
    """Raises UserError with the keys to change where the devices or the host run out of memory while `doing`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        raise UserError(f"Out of memory while {doing}{_amount(text)}. {advice(config, mesh, doing)}") from error


def advice(config: Config, mesh: Mesh, doing: Doing) -> str:
    """Returns what to change, in the order in which it costs least.

    What is already done is left out, and so is what would not help or would be refused.
    """
    micro = config.train.micro_batch_size or config.train.batch_size
    groups = pieces_along(mesh, "batch")  # rows are a multiple of them
    options = []
    if doing == "training":
        smaller = [rows for rows in range(groups, micro, groups) if config.train.batch_size % rows == 0]
        if smaller:
            options.append(f"train.micro_batch_size={smaller[-1]} (now {micro}; the result stays the same)")
        if config.model.remat not in ("full", "offload"):
            options.append(f"model.remat=full (now {config.model.remat}; the result stays the same)")
        elif config.model.remat != "offload" and platform_of(mesh) != "cpu":
            options.append("model.remat=offload (what the backward pass reads goes to the host's memory; the result stays the same)")
    if doing == "evaluating":
        rows = config.eval.batch_size or micro
        if rows > groups:
            options.append(f"eval.batch_size={max(groups, rows // 2 // groups * groups)} (now {rows}; the result stays the same)")
        if config.eval.generate:
            options.append(f"eval.max_new_tokens below {config.eval.max_new_tokens}")
    if doing in ("training", "evaluating") and config.model.compute_dtype == "float32":
        options.append("model.compute_dtype=bfloat16")
    sizes = {f"mesh.{axis}": mesh.shape[axis] for axis in ("fsdp", "tensor", "context")}
    if doing in ("loading the model", "exporting"):
        del sizes["mesh.context"]  # it cuts parameters as mesh.fsdp does, but what it is for are long rows
    named = ", ".join(f"{key} (now {size})" for key, size in sizes.items())
    options.append(f"more devices along one of {named}")
    if doing in ("training", "loading the model") and config.optim.name != "adafactor":
        options.append("optim.name=adafactor (its state is far smaller)")
    if doing in ("training", "loading the model") and config.optim.ema:
        options.append("optim.ema=0 (no average of the parameters)")
    if config.adapter.name != "none" and config.adapter.base_dtype != "nf4":
        options.append("adapter.base_dtype=nf4 in a new run (the base in four bits)")
    if config.model.dtype == "float32":
        options.append("model.dtype=bfloat16 (parameters and optimizer state)")
    if doing == "exporting":
        options.append("python -m sft_jax.export --model WORKDIR, which needs no optimizer state (with train.export=False here)")
    if doing in ("training", "evaluating"):
        options.append(f"data.max_length below {config.data.max_length}")
    return "Try, in this order: " + "; ".join(options) + "."


def _amount(text: str) -> str:
    found = re.search(r"(?:allocat\w+|used|needed)\D{0,40}?([\d.,]+\s?(?:[KMGT]i?B?|bytes))", text)
    return f" ({found.group(0)})" if found else ""
