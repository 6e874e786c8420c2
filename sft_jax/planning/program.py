"""The programs of a run for devices that need not exist: the step that training makes, with shapes in place of arrays."""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from sft_jax.batch import Batch, empty_batch
from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.evaluation.step import make_eval_step
from sft_jax.hf.source import Source
from sft_jax.model.devices import slices_along
from sft_jax.model.sharding import MESH_AXES, AnyMesh, abstract_mesh, batch_sharding, make_mesh
from sft_jax.planning.machines import Machine
from sft_jax.training.composition import Composition, compose
from sft_jax.training.optim import Optimizer
from sft_jax.training.placement import check_length, check_rows
from sft_jax.training.replication import check_replication
from sft_jax.training.state import TrainState, abstract_state
from sft_jax.training.step import make_train_step

# What libtpu would ask the machine for, and its log: there is no TPU here, and several may plan at once.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip


@dataclass(frozen=True)
class Programs:
    """The train step and the eval step of a run, and what they are given, in shapes and shardings."""

    composed: Composition
    optimizer: Optimizer
    state: TrainState
    batch: Batch  # [A, B, ...]
    eval_batch: Batch  # [B, ...]
    train_step: Callable[[TrainState, Batch], Any]
    eval_step: Callable[[TrainState, Batch], Any]

    @property
    def mesh(self) -> AnyMesh:
        return self.composed.mesh


def make_programs(config: Config, base: Source, mesh: AnyMesh, log: Callable[[str], None] = print) -> Programs:
    """Returns the programs of the run of `config` on `mesh`. Raises UserError for whatever the run would refuse."""
    micro = config.train.micro_batch_size or config.train.batch_size
    eval_rows = config.eval.batch_size or micro
    check_length(mesh, config.data.max_length)
    check_rows(mesh, micro, "train.micro_batch_size")
    check_rows(mesh, eval_rows, "eval.batch_size")
    composed = compose(config, base, mesh, log)
    optimizer = composed.optimizer(total_steps=max(config.train.steps, 1))
    graphdef, state = abstract_state(composed.abstract, optimizer, mesh)
    check_replication(state, mesh, config.train.max_replicated)
    return Programs(
        composed, optimizer, state, batch_shapes(config, mesh, config.train.batch_size // micro, micro),
        batch_shapes(config, mesh, eval_rows),
        make_train_step(graphdef, optimizer, mesh, config.loss, config.log.ledger), make_eval_step(graphdef, mesh),
    )  # fmt: skip


def batch_shapes(config: Config, mesh: AnyMesh, *leading: int) -> Batch:
    """Returns a batch of so many rows, or micro-batches of rows, in shapes and shardings."""
    rows = empty_batch(1, config.data.max_length, config.data.max_segments)
    sharding = batch_sharding(mesh, len(leading) - 1)
    return Batch(*(jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype, sharding=sharding) for x in rows))


def mesh_of(config: Config, machine: Machine, compiled: bool) -> AnyMesh:
    """Returns the mesh that the run makes of a machine's devices; an abstract one where nothing is `compiled` for them.

    Raises UserError where `config.mesh` does not multiply to them or cannot be laid over several nodes, or where there is no compiler.
    """
    sizes = mesh_sizes(vars(config.mesh), machine)
    slices_along({axis: sizes[axis] for axis in MESH_AXES}, machine.nodes)
    return make_mesh(**sizes, devices=tpu_devices(machine)) if compiled else abstract_mesh(**sizes)


def mesh_sizes(wanted: dict[str, int], machine: Machine) -> dict[str, int]:
    """Returns the devices along each axis, with what is left for the axis that is -1."""
    sizes = dict(wanted)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and machine.devices % fixed == 0:
        sizes[free[0]] = machine.devices // fixed
    if math.prod(sizes.values()) != machine.devices:
        asked = ", ".join(f"mesh.{name}={size}" for name, size in wanted.items() if size != 1)
        to_all = f"make them multiply to {machine.devices}, or set one to -1"
        remedy = f"make the others multiply to a divisor of {machine.devices}" if free else to_all
        raise UserError(f"{asked}: does not fit the {machine.devices} devices of {machine.name}; {remedy}.")
    return sizes


def tpu_devices(machine: Machine) -> list:
    """Returns the devices of slices that are not there, to compile for. Raises UserError where libtpu is missing."""
    os.environ.update({name: value for name, value in _LIBTPU.items() if name not in os.environ})
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(machine.shape) == 1 else {}
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    if machine.kind == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the machine itself
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=machine.topology, **options).devices)
    except (RuntimeError, ValueError, ImportError, OSError) as error:  # JaxRuntimeError is a RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology: {machine.name}: there is no compiler for it here ({reason}). Install libtpu "
            "(pip install 'sft_jax[tpu]'; it needs no TPU), or plan by estimate with --estimate."
        ) from error


def has_tpu_compiler() -> bool:
    """Returns whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def bytes_per_device(tree) -> int:
    """Returns the bytes that a tree of shapes with shardings takes on each device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def trained_bytes_fp32(state: TrainState) -> int:
    """Returns the bytes of one float32 gradient of all trained parameters on each device."""
    as_fp32 = lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding)  # noqa: E731
    return bytes_per_device(jax.tree.map(as_fp32, nnx.to_pure_dict(state.params)))
