"""An estimate of what a compiler would say, for machines without one here, and for a search that tries many settings.

The state is exact. What a step needs beside it is the largest of three moments: the loss, the backward pass of a layer, and
the update. Each holds what the forward pass has kept; the widths below follow from the layers. Measured against compiled
programs in tests/planning/test_estimate.py.

Letters: T positions of a micro-batch on one device, D hidden size, V columns of the head on one device, P parameters of a
layer on one device once they are gathered.
"""

import math
from dataclasses import dataclass

import jax
import numpy as np

from sft_jax.model.decoder import Decoder
from sft_jax.model.runs import plan_runs
from sft_jax.model.sharding import named_leaves
from sft_jax.model.spec import DecoderSpec, ExpertsSpec, LayerSpec
from sft_jax.planning.collectives import Collective
from sft_jax.planning.compiled import Compiled
from sft_jax.planning.machines import Machine
from sft_jax.planning.memory import Held, loss_shape
from sft_jax.planning.program import Programs, bytes_per_device


@dataclass(frozen=True)
class Widths:
    """Numbers for each position that a layer makes, on one device."""

    kept: float  # what its backward pass reads
    products: float  # of them, the results of products with kernels: what remat "dots" keeps
    beside: float  # gradients that its backward pass holds at once

    def __add__(self, other: "Widths") -> "Widths":
        return Widths(self.kept + other.kept, self.products + other.products, max(self.beside, other.beside))


def layer_widths(spec: DecoderSpec, layer: LayerSpec, tensor: int) -> Widths:
    """Returns the widths of one layer, whose heads and inner size are cut over `tensor` devices."""
    hidden = spec.hidden_size
    queries, read = spec.heads * spec.head_size / tensor, spec.heads * spec.value_size / tensor
    keys = spec.kv_heads * (spec.head_size + spec.value_size) / tensor
    mlp = layer.mlp
    if isinstance(mlp, ExpertsSpec):
        size = mlp.chosen * mlp.size / tensor + (mlp.shared_size or 0) / tensor
        rows, gated = 2 * mlp.chosen * hidden, True  # sorted by expert, on the way in and out
    else:
        size, rows, gated = mlp.size / tensor, 0, mlp.gated
    inner = (2 if gated else 1) * size
    products = queries + keys + inner + 2 * hidden
    # Beside them what each product reads: two normed states, queries, keys and values in blocks, what heads read, and the gate's.
    kept = products + 2 * hidden + queries + keys + read + size + rows
    return Widths(kept, products, max(inner + size + rows, 2 * (queries + read + 2 * keys)) + hidden)


def temporaries(programs: Programs, size: Held) -> int:
    """Returns an estimate of the bytes that a device needs for a step beside the state and the batch."""
    composed = programs.composed
    spec, options = composed.abstract.spec, composed.options
    item = np.dtype(options.compute_dtype).itemsize
    tensor = programs.mesh.shape["tensor"]
    positions, vocab = loss_shape(programs)
    kept, working = 0.0, 0.0
    for run in plan_runs(spec.layers):
        period = sum((layer_widths(spec, layer, tensor) for layer in run.period), Widths(0, 0, 0))
        inside = {"none": period.kept, "dots": period.products, "full": 0.0, "offload": 0.0}[options.remat]
        read = 0 if options.remat == "offload" else spec.hidden_size
        kept += run.repeats * positions * item * (read + inside)
        again = 0.0 if options.remat == "none" else period.kept - inside
        working = max(working, positions * item * (again + period.beside))
    working += layer_bytes(composed.abstract, tensor, item)
    head = spec.hidden_size * vocab
    loss = 2.5 * size.logits + 2 * positions * spec.hidden_size * item + item * head + (4 * head if _trains_head(programs) else 0)
    across = 0.0  # what the loop over micro-batches keeps: sums of gradients, old and new, the head, kernels in compute dtype
    if programs.batch.tokens.shape[0] > 1:
        across = 2 * size.gradients + item * head
        if item < np.dtype(composed.config.model.dtype).itemsize:
            across += bytes_per_device((programs.state.params, programs.state.frozen)) / 2
    return int(across + max(kept + loss, kept + size.gradients + working, size.gradients))


def layer_bytes(decoder: Decoder, tensor: int, item: int) -> float:
    """Returns the bytes of the largest layer's kernels on one device while they are gathered, with their gradient."""
    largest: dict[str, float] = {}
    for path, leaf in named_leaves(decoder):
        if path.startswith("runs."):
            place = ".".join(path.split(".")[:3])
            value, numbers = leaf.get_value(), leaf.get_metadata().get("numbers", 1)
            largest[place] = largest.get(place, 0.0) + math.prod(value.shape[1:]) * numbers
    return max(largest.values()) / tensor * 2 * item


def estimate(programs: Programs, size: Held, machine: Machine) -> Compiled:
    """Returns what a compiler would say of the train step on `machine`, as far as it can be said without one."""
    arguments = size.state + bytes_per_device(programs.batch)
    needed = arguments + (working := temporaries(programs, size))
    fits = needed <= machine.chip.memory
    return Compiled(
        fits, arguments, working, outputs=0, code=0, limit=None if fits else int(machine.chip.memory), largest=(),
        collectives=estimated_collectives(programs, size), whole=(),
    )  # fmt: skip


def estimated_collectives(programs: Programs, size: Held) -> tuple[Collective, ...]:
    """Returns what devices send each other in a step: kernels and gradients over the axes of rows, states over `tensor`."""
    config, mesh = programs.composed.config, programs.mesh.shape
    spec, micros = programs.composed.abstract.spec, programs.batch.tokens.shape[0]
    item = np.dtype(config.model.compute_dtype).itemsize
    positions, _ = loss_shape(programs)
    found = []

    def add(kind: str, count: float, times: float, group: int, overlapped: bool, what: str) -> None:
        factor = 2 if kind == "all-reduce" else 1
        if group > 1 and count:
            moved, numbers = factor * count * (group - 1) / group, int(count) // item
            found.append(Collective(kind, moved, times, overlapped, group, int(count), numbers, what))

    tensor, fsdp = mesh["tensor"], mesh["fsdp"]
    table = 0 if spec.tied_head else spec.vocab_rows * spec.hidden_size  # looked up where it lies; a tied head is gathered
    in_table = table if _trains(programs, "embed.embedding") else 0
    parameters = (sum(x.size for x in jax.tree.leaves((programs.state.params, programs.state.frozen))) - table) / tensor
    trained = (sum(x.size for x in jax.tree.leaves(programs.state.params)) - in_table) / tensor
    passes = 2 if config.model.remat == "none" else 3
    add("all-gather", parameters * item, passes * micros, fsdp, True, "kernels")
    add("reduce-scatter", trained * 4, micros, fsdp, True, "gradients")
    add("all-reduce", size.gradients, micros, mesh["data"], True, "gradients")
    states = positions * spec.hidden_size * item
    add("all-to-all", states, 2 * micros, fsdp, False, "embeddings and their gradients")
    add("all-reduce", states, (2 + passes) * len(spec.layers) * micros, tensor, False, "states between layers")
    return tuple(found)


def _trains(programs: Programs, path: str) -> bool:
    return any(choice.path == path and not choice.frozen for choice in programs.optimizer.choices)


def _trains_head(programs: Programs) -> bool:
    return _trains(programs, "embed.embedding" if programs.composed.abstract.spec.tied_head else "lm_head.kernel")
