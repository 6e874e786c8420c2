"""Arrays that no device should ever hold whole, looked for in a compiled program.

A layout that is wrong in one place still trains, with the memory and the traffic of a layout that does not scale: logits of all
positions, a table of embeddings or its gradient, or a parameter of all layers gathered at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sft_jax.evaluation.step import DOCUMENTS
from sft_jax.planning.collectives import Collective

_SHAPE = re.compile(r"\b(pred|bf16|f8\w*|[fsu]\d+)\[([\d,]+)\]")


@dataclass(frozen=True)
class Limits:
    """Sizes on one device of what a program may not form."""

    positions: int  # of a micro-batch
    vocab: int  # columns of the head
    hidden: int
    kernel: int  # numbers in the largest kernel of one layer, once it is gathered
    head: int  # numbers in the head, which the loss gathers
    table: tuple[int, int] | None  # shape of the table of embeddings, where the head has another


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
    for one in found:
        # The model's own, of hidden states and of kernels of one layer; and three numbers for each example.
        if "shard_map" in one.operation or DOCUMENTS in one.operation:
            continue
        if one.kind == "all-gather" and one.elements > limits.kernel and one.elements != limits.head:
            lines.append(f"more than one layer is gathered at once: {one.elements:,} numbers in {one.operation}")
    return lines
