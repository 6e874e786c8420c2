"""An estimate of what a compiler would say, for machines without one here, and for a search that tries many settings.

The state is exact. What a step needs beside it is the largest of a few moments: the loss, the backward pass of a layer, and
the gradient of the head. The first two hold what the forward pass has kept; the widths below follow from the layers.
scripts/check_estimates.py compares it with compiled programs.

Letters: T positions of a micro-batch on one device, D hidden size, V columns of the head on one device, P parameters of a
layer on one device once they are gathered.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from sft_jax.model.cross_entropy import chunk_rows
from sft_jax.model.devices import slices_along
from sft_jax.model.grouped import SPARE
from sft_jax.model.runs import plan_runs
from sft_jax.model.sharding import LAYOUT, named_leaves, pieces_along
from sft_jax.model.spec import DecoderSpec, ExpertsSpec, LayerSpec
from sft_jax.planning.collectives import Collective
from sft_jax.planning.compiled import Compiled
from sft_jax.planning.launcher import gathers_ahead
from sft_jax.planning.machines import Machine
from sft_jax.planning.memory import Held, loss_shape
from sft_jax.planning.program import Programs, bytes_per_device
from sft_jax.training.groups import Choice

# What follows was read from the programs of scripts/check_estimates.py as libtpu 0.0.42 compiles them (scripts/estimates.jsonl).
# Stacks over layers, of what each keeps and of gradients, take more than their bytes, since the plan of a TPU's memory has gaps between
# its largest arrays; that of a CPU has none (scripts/check_cpu_peaks.py). Of GPUs nothing was measured: the larger one is safe.
_STACKED = {"tpu": 1.65, "gpu": 1.65, "cpu": 1.0}
# Chunks of logits that the loss holds at once: the logits, their exponentials, their gradient in part.
_CHUNKS = 1.6
# Columns of a tile of a TPU's memory. A table gathered from shards of other widths is put in order by a copy, for whose place there
# must be room beside the gathered one.
_TILE, _PUT_IN_ORDER = 128, 2.7
# Bytes beside a layer's kernels, for each number of those of its experts, where experts are cut and compute in rounds: float32 sums
# of all rounds and of one, and what a round hands on.
_ROUNDS = 26
# States that a layer cut over `tensor` holds while they are summed over its devices, in and out, forwards and backwards.
_SUMMED_STATES = 8
# Copies of all gradients while they are summed over `data`: one beside what is summed where parameters are whole on each device.
_SUMMED, _SUMMED_WHOLE = 0.3, 1.5
# Devices of a TPU slice over which libtpu 0.0.42 scatters a sum. Over more, which lie along two axes of the slice, it makes even a
# reduce-scatter that the program asks for of an all-reduce, of which each device keeps its part: twice the bytes.
_SCATTERED = 8
# Newton-Schulz steps of Muon, each of which gathers the matrix once, in 16 bits where products are of these (libtpu 0.0.42).
_ITERATIONS = 5
# How many times what is gathered of a layer it takes to gather it ahead with the launchers' flags: frozen kernels as they are; those
# that are trained, whose gradients leave later, or made of blocks; those of experts; and keys and values of whole rows. The head is
# gathered ahead too, so that it lies beside the backward pass.
_FROZEN_AHEAD, _KERNELS_AHEAD, _EXPERTS_AHEAD, _KEYS_AHEAD = 0.7, 2.5, 3.5, 10
# Copies of keys and values of whole rows, where rows are cut over devices: gathered, and the gradient.
_WHOLE_ROWS = 2


@dataclass(frozen=True)
class Widths:
    """Numbers for each position that a layer makes, on one device."""

    kept: float  # what its backward pass reads
    products: float  # of them, the results of products with kernels: what remat "dots" keeps
    beside: float  # gradients that its backward pass holds at once

    def __add__(self, other: "Widths") -> "Widths":
        return Widths(self.kept + other.kept, self.products + other.products, max(self.beside, other.beside))


def layer_widths(spec: DecoderSpec, layer: LayerSpec, tensor: int, context: int = 1, expert: int = 1) -> Widths:
    """Returns the widths of one layer, whose heads and inner size are cut over `tensor` devices.

    Over `context` devices rows are cut, and keys and values gathered for one layer. Over `expert` devices the tokens of all
    are gathered, and rows of experts are computed in rounds.
    """
    hidden = spec.hidden_size
    queries, read = spec.heads * spec.head_size / tensor, spec.heads * spec.value_size / tensor
    keys = spec.kv_heads * (spec.head_size + spec.value_size) / tensor
    mlp = layer.mlp
    whole = _WHOLE_ROWS * context * keys if context > 1 else 0
    if isinstance(mlp, ExpertsSpec):
        chosen = mlp.chosen * (SPARE if expert > 1 else 1)
        size = chosen * mlp.size / tensor + (mlp.shared_size or 0) / tensor
        rows, gated = 2 * chosen * hidden, True  # sorted by expert, on the way in and out
        whole += expert * 5 * hidden if expert > 1 else 0  # tokens, and float32 sums and their gradient
    else:
        size, rows, gated = mlp.size / tensor, 0, mlp.gated
    inner = (2 if gated else 1) * size
    products = queries + keys + inner + 2 * hidden
    # Beside them what each product reads: two normed states, queries, keys and values in blocks, what heads read, and the gate's.
    kept = products + 2 * hidden + queries + keys + read + size + rows
    return Widths(kept, products, max(inner + size + rows, 2 * (queries + read + 2 * keys)) + hidden + whole)


def temporaries(programs: Programs, size: Held, platform: str, ahead: bool = False) -> int:
    """Returns an estimate of the bytes that a device needs for a step beside the state and the batch.

    `ahead`: Layers are gathered before they are needed.
    """
    composed, mesh = programs.composed, programs.mesh
    spec, item = composed.abstract.spec, np.dtype(composed.options.compute_dtype).itemsize
    positions, vocab = loss_shape(programs, programs.batch)
    head, micros, pieces = spec.hidden_size * vocab, programs.batch.tokens.shape[0], pieces_along(mesh, "embed")
    cast = item < np.dtype(composed.config.model.dtype).itemsize
    read_head = item * head if cast or pieces > 1 else 0  # as the loss reads it, where that is not as it lies
    across = size.gradients if micros > 1 else 0  # what the loop over micro-batches keeps
    if micros > 1 and cast:  # what is made of parameters alone is made before it
        across += bytes_per_device((programs.state.params, programs.state.frozen)) / 2 + read_head
        read_head = 0
    # The gradient of the head: the zeros that it begins as, the sum of one device, and where it is not scattered that over all, of
    # which a device keeps its part. It waits for those of the layers.
    whole = 4 * head if _trains_head(programs) else 0
    summed = whole if pieces > _SCATTERED else 0
    loss = _CHUNKS * size.logits + 2 * positions * spec.hidden_size * item + 2 * whole + summed + read_head
    if pieces > 1 and spec.tied_head and spec.hidden_size // pieces % _TILE:
        loss += _PUT_IN_ORDER * item * head
    stacked = _STACKED[platform]
    kept, working = _layers(programs)
    kept *= stacked
    of_layers = size.gradients - whole * (1 if spec.tied_head else 2) / pieces
    backward = working + size.gradients + (stacked - 1) * max(of_layers, 0) + whole + summed
    if mesh.shape["data"] > 1:
        backward += size.gradients * (_SUMMED if pieces > 1 else _SUMMED_WHOLE)
    if ahead:
        backward += ahead_bytes(programs) + read_head
    return int(across + max(kept + loss, kept + backward, size.gradients + orthogonalising_bytes(programs)))


def _layers(programs: Programs) -> tuple[float, float]:
    """Returns the bytes of what all layers keep for the backward pass, and of what the largest of them holds while it runs."""
    composed, mesh = programs.composed, programs.mesh
    spec, remat = composed.abstract.spec, composed.options.remat
    item = np.dtype(composed.options.compute_dtype).itemsize
    positions, _ = loss_shape(programs, programs.batch)
    kept, working = 0.0, 0.0
    for run in plan_runs(spec.layers):
        widths = (layer_widths(spec, layer, mesh.shape["tensor"], mesh.shape["context"], mesh.shape["expert"]) for layer in run.period)
        period = sum(widths, Widths(0, 0, 0))
        inside = {"none": period.kept, "dots": period.products, "full": 0.0, "offload": 0.0}[remat]
        read = 0 if remat == "offload" else spec.hidden_size
        kept += run.repeats * (read + inside)
        again = 0.0 if remat == "none" else period.kept - inside
        working = max(working, again + period.beside)
    if mesh.shape["tensor"] > 1:
        working += _SUMMED_STATES * spec.hidden_size
    return positions * item * kept, positions * item * working + kernel_bytes(programs, item, gradients=True)


def orthogonalised(programs: Programs) -> list[Choice]:
    """Returns the parameters whose updates are made by Muon: matrices or stacks of them, of which devices gather one layer at a time."""
    return [choice for choice in programs.optimizer.choices if choice.optimizer == "muon" and not choice.frozen]


def orthogonalising_bytes(programs: Programs) -> float:
    """Returns the bytes of one layer's matrix while it is orthogonalised, with its products by itself, and of the stack that results."""
    stacks = [choice.shape for choice in orthogonalised(programs)]
    cut = pieces_along(programs.mesh, "embed")
    one = max((math.prod(shape[1:]) + 2 * math.prod(shape[1:-2]) * min(shape[-2:]) ** 2 for shape in stacks), default=0)
    return 4 * (one / programs.mesh.shape["tensor"] + max(map(math.prod, stacks), default=0) / cut / programs.mesh.shape["tensor"])


def evaluation_temporaries(programs: Programs) -> int:
    """Returns an estimate of the bytes that a device needs for an evaluation step beside the parameters and the batch.

    It keeps nothing for a backward pass: what one layer makes, with its kernels, or a chunk of logits with the head.
    """
    composed, mesh = programs.composed, programs.mesh
    spec = composed.abstract.spec
    item = np.dtype(composed.options.compute_dtype).itemsize
    positions, vocab = loss_shape(programs, programs.eval_batch)
    of_layers = (layer_widths(spec, layer, mesh.shape["tensor"], mesh.shape["context"], mesh.shape["expert"]) for layer in spec.layers)
    layer = positions * item * (spec.hidden_size + max(widths.beside for widths in of_layers)) + kernel_bytes(programs, item, gradients=False)
    loss = 1.5 * 4 * chunk_rows(positions, vocab) * vocab + item * spec.hidden_size * vocab
    return int(positions * item * spec.hidden_size + max(layer, loss))


def kernel_bytes(programs: Programs, item: int, gradients: bool) -> float:
    """Returns the bytes of the largest layer's kernels on one device while they are gathered; if asked with the gradients of those trained.

    Experts are gathered over all axes but their own, and their backward pass reads them in another order. Kernels stored in blocks
    are made one at a time.
    """
    trained = {choice.path for choice in programs.optimizer.choices if not choice.frozen}
    quantised = any(kernel.path.endswith(".codes") for kernel in _kernels(programs))
    rounds = _ROUNDS if gradients and programs.mesh.shape["expert"] > 1 else 0
    layers: dict[str, list[float]] = {}
    for kernel in _kernels(programs):
        twice = gradients and (kernel.path in trained or kernel.of_experts)
        size = kernel.gathered * (item * (2 if twice else 1) + (rounds if kernel.of_experts else 0))
        layers.setdefault(kernel.layer, []).append(size)
    return max(2 * max(kernels) if quantised else sum(kernels) for kernels in layers.values())


class _Kernel(NamedTuple):
    path: str
    layer: str  # of which there may be many, all alike
    gathered: float  # numbers of one layer's on one device
    of_experts: bool


def _kernels(programs: Programs) -> Iterator[_Kernel]:
    """Yields the parameters of layers."""
    tensor, expert = programs.mesh.shape["tensor"], programs.mesh.shape["expert"]
    for path, leaf in named_leaves(programs.composed.abstract):
        if path.startswith("runs."):
            value, numbers = leaf.get_value(), leaf.get_metadata().get("numbers", 1)
            count = math.prod(value.shape[1:]) * numbers / (expert if value.ndim == 4 else 1) / tensor
            yield _Kernel(path, ".".join(path.split(".")[:3]), count, value.ndim == 4)


def ahead_bytes(programs: Programs) -> int:
    """Returns the bytes that a TPU takes for what it gathers before a layer needs it, with the launchers' flags.

    Keys and values of rows over `context`, kernels over the axes of parameters.
    """
    spec, mesh = programs.composed.abstract.spec, programs.mesh
    item = np.dtype(programs.composed.options.compute_dtype).itemsize
    trained = {choice.path for choice in programs.optimizer.choices if not choice.frozen}
    layers: dict[str, float] = {}
    for kernel in _kernels(programs) if pieces_along(mesh, "embed") > 1 else ():
        as_it_is = kernel.path not in trained and not kernel.path.endswith(".codes")
        times = _EXPERTS_AHEAD if kernel.of_experts else _FROZEN_AHEAD if as_it_is else _KERNELS_AHEAD
        layers[kernel.layer] = layers.get(kernel.layer, 0) + times * kernel.gathered
    positions, _ = loss_shape(programs, programs.batch)
    rows = positions * mesh.shape["context"] * spec.kv_heads * (spec.head_size + spec.value_size) / mesh.shape["tensor"]
    return int(item * (max(layers.values(), default=0) + (_KEYS_AHEAD * rows if mesh.shape["context"] > 1 else 0)))


def estimate(programs: Programs, size: Held, machine: Machine, flags: Mapping[str, str]) -> Compiled:
    """Returns what a compiler would say of the train step on `machine`, given `flags`, as far as it can be said without one."""
    arguments = size.state + bytes_per_device(programs.batch)
    working = temporaries(programs, size, machine.chip.platform, gathers_ahead(flags))
    needed = arguments + working + int(machine.chip.process)
    fits = needed <= machine.chip.memory
    return Compiled(
        fits, arguments, working, outputs=0, code=0, limit=None if fits else int(machine.chip.memory), largest=(),
        collectives=estimated_collectives(programs, size, machine), whole=(),
    )  # fmt: skip


def estimate_evaluation(programs: Programs, size: Held, machine: Machine) -> Compiled:
    """Returns what a compiler would say of the eval step, of which the state beside the parameters is no argument."""
    arguments = size.trained + size.frozen + bytes_per_device(programs.eval_batch)
    working = evaluation_temporaries(programs)
    fits = arguments + working + size.optimizer + size.average + int(machine.chip.process) <= machine.chip.memory
    return Compiled(
        fits, arguments, working, outputs=0, code=0, limit=None if fits else int(machine.chip.memory), largest=(), collectives=(), whole=()
    )  # fmt: skip


def estimated_collectives(programs: Programs, size: Held, machine: Machine) -> tuple[Collective, ...]:
    """Returns what devices send each other in a step.

    Kernels and gradients over the axes of rows, states over `tensor`, keys and values over `context`, tokens over `expert`. Nodes
    lie along the axes as they do in the run's mesh.
    """
    config, mesh = programs.composed.config, programs.mesh.shape
    spec, micros = programs.composed.abstract.spec, programs.batch.tokens.shape[0]
    item = np.dtype(config.model.compute_dtype).itemsize
    positions, _ = loss_shape(programs, programs.batch)
    over, found = slices_along(mesh, machine.nodes), []

    def add(kind: str, count: float, times: float, axes: Sequence[str], overlapped: bool, what: str) -> None:
        group, nodes = (math.prod(sizes[axis] for axis in axes) for sizes in (mesh, over))
        factor = 2 if kind == "all-reduce" else 1
        if group > 1 and count:
            moved, numbers = factor * count * (group - 1) / group, int(count) // item
            found.append(Collective(kind, moved, times, overlapped, group, int(count), numbers, what, nodes=nodes))

    tensor, parameter_axes = mesh["tensor"], LAYOUT["embed"]
    passes = 2 if config.model.remat == "none" else 3
    for of_experts, axes in ((False, parameter_axes), (True, LAYOUT["expert_embed"])):  # kernels of experts are not gathered over them
        shared = tensor * (mesh["expert"] if of_experts else 1)
        trained, frozen = (sum(x.size for x in jax.tree.leaves(tree) if (x.ndim == 4) == of_experts) for tree in _parameters(programs))
        if not (of_experts or spec.tied_head):  # the table is looked up where it lies; a tied head is gathered
            trained, frozen = (size - share for size, share in zip((trained, frozen), _table(programs), strict=True))
        add("all-gather", (trained + frozen) / shared * item, passes * micros, axes, True, "kernels")
        whole = machine.chip.platform == "tpu" and math.prod(mesh[axis] for axis in axes) > _SCATTERED
        add("all-reduce" if whole else "reduce-scatter", trained / shared * 4, micros, axes, not whole, "gradients")
    add("all-reduce", size.gradients, micros, ("data",), True, "gradients")
    matrices = sum(math.prod(choice.shape) for choice in orthogonalised(programs))
    add("all-gather", matrices / tensor * item, _ITERATIONS, parameter_axes, False, "matrices that Muon multiplies")
    states, layers = positions * spec.hidden_size * item, len(spec.layers)
    add("all-to-all", states, 2 * micros, parameter_axes, False, "embeddings and their gradients")
    add("all-reduce", states, (2 + passes) * layers * micros, ("tensor",), False, "states between layers")
    rows = positions * mesh["context"] * spec.kv_heads * (spec.head_size + spec.value_size) / tensor * item
    add("all-gather", rows, passes * layers * micros, ("context",), False, "keys and values of whole rows")
    add("reduce-scatter", rows, layers * micros, ("context",), False, "gradients of keys and values")
    mixtures = sum(isinstance(layer.mlp, ExpertsSpec) for layer in spec.layers)
    tokens = states * mesh["expert"]
    add("all-gather", tokens, passes * mixtures * micros, ("expert",), False, "tokens of other experts")
    add("reduce-scatter", tokens * 4 / item, passes * mixtures * micros, ("expert",), False, "what experts make of tokens")
    return tuple(found)


def _parameters(programs: Programs) -> tuple[Any, Any]:
    """Returns the trained parameters and the frozen ones."""
    return programs.state.params, programs.state.frozen


def _table(programs: Programs) -> tuple[int, int]:
    """Returns the size of the table of embeddings if it is trained, and if it is frozen; 0 otherwise."""
    spec = programs.composed.abstract.spec
    size = spec.vocab_rows * spec.hidden_size
    return (size, 0) if _trains(programs, "embed.embedding") else (0, size)


def _trains(programs: Programs, path: str) -> bool:
    return any(choice.path == path and not choice.frozen for choice in programs.optimizer.choices)


def _trains_head(programs: Programs) -> bool:
    return _trains(programs, "embed.embedding" if programs.composed.abstract.spec.tied_head else "lm_head.kernel")
