"""Arrays that no device should ever hold whole, looked for in a compiled program.

A layout that is wrong in one place still trains, with the memory and the traffic of a layout that does not scale: logits of all
positions, a table of embeddings or its gradient, or a parameter of all layers gathered at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sft_jax.evaluation.step import DOCUMENTS
from sft_jax.model.sharding import TOKENS
from sft_jax.planning.collectives import Collective

_SHAPE = re.compile(r"\b(pred|bf16|f8\w*|[fsu]\d+)\[([\d,]+)\]")


@dataclass(frozen=True)
class Limits:
    """Sizes on one device of what a program may not form. Parameters are as a device reads them, cut for what it computes."""

    positions: int  # of a micro-batch
    vocab: int  # columns of the head
    hidden: int
    kernel: int  # numbers in the largest kernel of one layer, once it is gathered
    head: int  # numbers in the head, which the loss gathers
    table: tuple[int, int] | None  # shape of the table of embeddings, where the head has another
    states: int  # numbers in the largest array of activations that devices gather or add up for one layer
    share: int  # numbers in the largest part of a parameter that a device stores
    documents: int  # numbers that the sums of documents have, which every process reads
    stacks: frozenset[tuple[int, ...]]  # shapes of parameters of all layers of which a device stores a part, larger than `kernel`; no dimensions of 1


def whole_arrays(text: str, found: Sequence[Collective], limits: Limits) -> list[str]:
    """Returns a line for each breach in the text of an optimised HLO module whose collectives are `found`."""
    lines = []
    for kind, shape in sorted(set(_SHAPE.findall(text))):
        sizes = [int(size) for size in shape.split(",")]
        if tuple(sizes) == limits.table and kind != "pred":
            lines.append(f"the table of embeddings or its gradient is formed whole: {kind}[{shape}]")
        if limits.vocab not in sizes:
            continue
        rows = 1
        for size in sizes:
            rows *= size
        rows //= limits.vocab
        if rows >= limits.positions and rows != limits.hidden:
            lines.append(f"logits of all positions are formed: {kind}[{shape}]")
    return lines + [line for one in found if one.devices > 1 and (line := _too_large(one, limits))]


def _too_large(one: Collective, limits: Limits) -> str:
    """Returns what is wrong with an array that a collective makes whole on every device, or ""."""
    if one.kind not in ("all-gather", "all-reduce"):
        return ""
    done = "gathered" if one.kind == "all-gather" else "added up"
    told = f"{one.elements:,} numbers ({one.dtype}[{','.join(map(str, one.shape))}]) in {one.operation or 'no operation'}"
    if tuple(size for size in one.shape if size != 1) in limits.stacks:
        return f"more than one layer is {done} at once: {told}"
    if one.elements == limits.head and limits.vocab in one.shape:
        return ""
    if DOCUMENTS in one.operation:
        most = limits.documents
    elif one.kind == "all-reduce":  # of gradients, and of states that devices hold in parts
        most = max(limits.kernel, limits.share, limits.states)
    else:
        most = limits.states if TOKENS in one.operation else limits.kernel
    return f"more than one layer is {done} at once: {told}" if one.elements > most else ""
