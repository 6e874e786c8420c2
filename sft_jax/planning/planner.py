"""A plan: what the run of a configuration would need of a machine, found without the machine."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sft_jax.batch import Batch
from sft_jax.config import Config
from sft_jax.hf.hub import download
from sft_jax.hf.restore import model_source
from sft_jax.hf.source import Source, as_folder, is_hub_id
from sft_jax.model.adapters import is_adapter
from sft_jax.model.blocked_attention import block_size
from sft_jax.model.cross_entropy import chunk_rows
from sft_jax.model.platform import tracing_for
from sft_jax.model.runs import plan_runs
from sft_jax.model.sharding import GATHERED, LAYOUT, named_leaves, pieces_along
from sft_jax.planning.compiled import Compiled, compile_program
from sft_jax.planning.estimate import estimate, estimate_evaluation
from sft_jax.planning.flops import Loops, count_flops
from sft_jax.planning.launcher import compiler_flags
from sft_jax.planning.machines import Machine
from sft_jax.planning.memory import Held, held, loss_shape
from sft_jax.planning.program import Programs, bytes_per_device, make_programs, mesh_of
from sft_jax.planning.roofline import Roofline, roofline
from sft_jax.planning.whole_arrays import Limits
from sft_jax.planning.work import Work, work_of
from sft_jax.training.hardware import training_flops
from sft_jax.training.report import matmul_parameters

Log = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What the run would need. Bytes are those of each device."""

    config: Config
    machine: Machine
    estimated: bool  # memory and collectives, and not compiled
    mesh: dict[str, int]
    held: Held
    train: Compiled
    evaluation: Compiled | None
    flops: float  # of a step, as computed
    model_flops: float  # of a step, without what remat computes again
    roofline: Roofline
    work: Work
    flags: Mapping[str, str]  # options with which the programs are compiled

    @property
    def whole(self) -> tuple[str, ...]:
        """Arrays that no device should hold whole, see sft_jax.planning.whole_arrays: of the train step, and of an evaluation."""
        evaluation = () if self.evaluation is None else self.evaluation.whole
        return (*self.train.whole, *(f"in an evaluation {text}" for text in evaluation))

    @property
    def needed(self) -> int:
        """Bytes that the run needs at its peak: of the train step, or of an evaluation beside the state, and of its process."""
        return max(self.train.needed, self.evaluation_needed) + int(self.machine.chip.process)

    @property
    def evaluation_needed(self) -> int:
        """Bytes while the run is evaluated: its step takes the parameters alone, and the rest of the state stays where it is."""
        if self.evaluation is None:
            return 0
        return self.evaluation.needed + self.held.state - self.held.trained - self.held.frozen

    @property
    def room(self) -> int:
        """Bytes that are left over; below 0: missing."""
        return int(self.machine.chip.memory) - self.needed

    @property
    def fits(self) -> bool:
        return self.train.fits and (self.evaluation is None or self.evaluation.fits) and self.room >= 0


def base_of(config: Config) -> Source:
    """Returns the model of a run. It needs config.json alone: of a hub id no weights are fetched."""
    path = config.model.path
    folder = as_folder(path)
    return model_source(str(download(path, weights=False)) if not folder.is_dir() and is_hub_id(path) else path)


def make_plan(
    config: Config, machine: Machine, base: Source, work: Work | None = None, tokens: float | None = None,
    estimated: bool = False, log: Log = print, plain: bool = False,
) -> Plan:  # fmt: skip
    """Returns the plan of the run of `config`, from its compiled programs; of GPUs, and where asked for, from an estimate.

    Args:
        work: That of an earlier plan with the same data; None: it is found as `work_of` says.
        plain: Without the flags that the launchers set for TPUs.

    Raises UserError for whatever the run would refuse.
    """
    estimated = estimated or machine.chip.platform != "tpu"
    flags = compiler_flags(machine.chip.platform, plain)
    with tracing_for(machine.chip.platform):
        programs = make_programs(config, base, mesh_of(config, machine, compiled=not estimated), log)
        spec = programs.composed.abstract.spec
        work = work_of(config, spec.layers, spec.vocab_size, tokens, log) if work is None else work
        size = held(programs)
        traced = programs.train_step.trace(programs.state, programs.batch)
        flops = count_flops(traced.jaxpr, loops_of(programs, work))
        if estimated:
            return estimated_plan(programs, machine, work, flops, flags)
        train, evaluation = _compile(programs, traced, size, machine, flags)
    return Plan(
        config, machine, False, dict(programs.mesh.shape), size, train, evaluation, flops, model_flops(programs, work),
        roofline(machine, config.model, flops, memory_traffic(programs, size), train.collectives, offloaded_bytes(programs)), work, flags,
    )  # fmt: skip


def _compile(
    programs: Programs, traced: jax.stages.Traced, size: Held, machine: Machine, flags: Mapping[str, str]
) -> tuple[Compiled, Compiled | None]:
    """Returns what the compiler says of the train step and, where there are held-out data, of the eval step."""
    full = loops_of(programs, None)

    def compiled(lowered: jax.stages.Lowered, arguments: int, batch: Batch) -> Compiled:
        limits = limits_of(programs, batch)
        return compile_program(lowered, machine.topology, machine.devices, arguments, lambda loop: full.of(loop.op_name), limits, flags)

    train = compiled(traced.lower(), size.state + bytes_per_device(programs.batch), programs.batch)
    if not (programs.composed.config.data.eval and train.fits):
        return train, None
    lowered = programs.eval_step.lower(programs.state, programs.eval_batch)
    return train, compiled(lowered, size.trained + size.frozen + bytes_per_device(programs.eval_batch), programs.eval_batch)


def loops_of(programs: Programs, work: Work | None) -> Loops:
    """Returns how often the loops of attention and loss run, for the work of a row; None: for full, supervised rows."""
    length = programs.composed.config.data.max_length
    positions, vocab = loss_shape(programs, programs.batch)
    chunk = chunk_rows(positions, vocab)
    block = min(block_size(), length)
    pairs = length * (length + 1) / 2 if work is None else work.pairs
    supervised = 1.0 if work is None else work.supervised / length
    # A block of queries looks at half a block more than its pairs fill: the one on the diagonal is computed whole.
    chunks = max(np.ceil(positions * supervised / chunk), 1.0)
    return Loops(pairs / length / block + 0.5, chunks, programs.batch.tokens.shape[0])


def limits_of(programs: Programs, batch: Batch) -> Limits:
    """Returns the sizes of what no device may hold whole in the train step or the eval step, by the batch that it is given."""
    positions, vocab = loss_shape(programs, batch)
    spec, mesh, data = programs.composed.abstract.spec, programs.mesh.shape, programs.composed.config.data

    def read(path, leaf) -> tuple[int, ...]:
        """Shape of a parameter as a device reads it: gathered, but for the axes that cut what is computed."""
        cut = [math.prod(mesh[name] for name in LAYOUT[axis]) if axis not in (None, *GATHERED) else 1 for axis in leaf.axes]
        return tuple(-(-size // pieces) for size, pieces in zip(leaf.get_value().shape, cut, strict=True))

    stacked, share, kernel = set(), 0, 0
    for path, leaf in named_leaves(programs.composed.abstract):
        value, layers = leaf.get_value(), int(path.startswith("runs."))  # its first axis
        whole, part = read(path, leaf), value.sharding.shard_shape(value.shape) if value.sharding is not None else value.shape
        share = max(share, math.prod(part))
        if layers or is_adapter(path):
            kernel = max(kernel, math.prod(whole[layers:]) * leaf.get_metadata().get("numbers", 1))
        if layers and whole[0] > 1 and math.prod(part) < math.prod(whole):
            stacked.add(tuple(size for size in whole if size != 1))
    stacked = {shape for shape in stacked if math.prod(shape) > kernel}  # all layers of a vector are less than a kernel
    rows = spec.vocab_rows // mesh["tensor"]
    cut_along_hidden = any(mesh[name] > 1 for name in LAYOUT["embed"])
    table = (rows, spec.hidden_size) if cut_along_hidden and not spec.tied_head else None
    keys = spec.kv_heads * max(spec.head_size, spec.value_size) / mesh["tensor"]
    width = max(spec.hidden_size * mesh["expert"], mesh["context"] * keys, pieces_along(programs.mesh, "embed"))  # states, keys, tokens
    documents = 3 * math.prod(batch.tokens.shape[:-1]) * data.max_segments
    return Limits(
        positions, vocab, spec.hidden_size, kernel, rows * spec.hidden_size, table, int(positions * width), share, documents, frozenset(stacked)
    )  # fmt: skip


def model_flops(programs: Programs, work: Work) -> float:
    """Returns the model FLOPs of a step, of which MFU is made, as the run's summary counts them."""
    spec = programs.composed.abstract.spec
    trained, frozen = matmul_parameters(programs.optimizer.choices, spec)
    width = spec.heads * (spec.head_size + spec.value_size) // 2
    rows = programs.composed.config.train.batch_size
    return training_flops(trained, frozen, width, rows * work.tokens, rows * work.pairs * len(spec.layers))


def estimated_plan(programs: Programs, machine: Machine, work: Work, flops: float, flags: Mapping[str, str]) -> Plan:
    """Returns the plan of `programs` by estimate, for `flops` a step and options of the compiler; nothing is traced."""
    size = held(programs)
    train = estimate(programs, size, machine, flags)
    config = programs.composed.config
    evaluation = estimate_evaluation(programs, size, machine) if config.data.eval else None
    return Plan(
        config, machine, True, dict(programs.mesh.shape), size, train, evaluation, flops, model_flops(programs, work),
        roofline(machine, config.model, flops, memory_traffic(programs, size), train.collectives, offloaded_bytes(programs)), work, flags,
    )  # fmt: skip


def memory_traffic(programs: Programs, size: Held) -> float:
    """Returns an estimate of the bytes that a device reads and writes in a step.

    Each micro-batch reads every kernel in the forward pass, again in the backward pass and once more where it is computed
    again, and adds to every gradient; the update reads and writes state and gradient. Activations are left out: of rows of
    thousands of tokens the kernels' products need far longer than reading them.
    """
    config = programs.composed.config
    micros = programs.batch.tokens.shape[0]
    item = np.dtype(config.model.compute_dtype).itemsize
    tensor = programs.mesh.shape["tensor"]
    kernels = sum(x.size for x in jax.tree.leaves((programs.state.params, programs.state.frozen))) * item / tensor
    passes = 2 if config.model.remat == "none" else 3
    return micros * (passes * kernels + 2 * size.gradients) + 2 * (size.state - size.frozen) + size.gradients


def offloaded_bytes(programs: Programs) -> float:
    """Returns the bytes that a device sends to its host in a step: what each period of blocks reads, with model.remat=offload."""
    config, spec = programs.composed.config, programs.composed.abstract.spec
    if config.model.remat != "offload":
        return 0.0
    positions, _ = loss_shape(programs, programs.batch)
    states = positions * spec.hidden_size * np.dtype(config.model.compute_dtype).itemsize
    return float(states * programs.batch.tokens.shape[0] * sum(run.repeats for run in plan_runs(spec.layers)))


def describe_mesh(mesh: dict[str, int]) -> str:
    """Returns the axes of a mesh along which there is more than one device."""
    return ", ".join(f"{name} {count}" for name, count in mesh.items() if count > 1) or "one device"


def as_overrides(values: dict[str, Any]) -> str:
    """Returns settings as flags that can be pasted behind a command."""
    return " ".join(f"--config.{key}={value}" for key, value in values.items())
