"""The fastest settings that fit a machine: layout, remat and micro-batch, which change how a run computes and not what.

Settings are ranked by estimate; for each layout and remat policy the largest micro-batch that fits is found by bisection. Layouts
are tried in stages, each on the best of those before it, so that a search takes no product of all axes. Then the best are compiled,
where there is a compiler, until enough of them fit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.hf.load import spec_of
from sft_jax.hf.source import Source
from sft_jax.model.decoder import REMAT_POLICIES
from sft_jax.model.platform import tracing_for
from sft_jax.model.sharding import LAYOUT
from sft_jax.model.spec import DecoderSpec, ExpertsSpec
from sft_jax.planning.flops import count_flops
from sft_jax.planning.launcher import compiler_flags
from sft_jax.planning.machines import Machine
from sft_jax.planning.planner import Plan, estimated_plan, loops_of, make_plan
from sft_jax.planning.program import Programs, batch_shapes, make_programs, mesh_of
from sft_jax.planning.work import Work, work_of

Mesh = dict[str, int]

_TENSOR = (1, 2, 4, 8)  # more than the chips of a host talk too slowly for it
_LONG = 8192  # tokens of a row from which on it may be cut over `context`
_STRETCH = 2048  # tokens of a row that a device has at least
_KEPT = 4  # layouts of which the next stage tries variants
_TRIED = 8  # layouts for which another batch size is looked for
_COMPILED = 3  # plans that are shown, each compiled


def search(
    config: Config, machine: Machine, base: Source, tokens: float | None, estimated: bool, log: Callable[[str], None],
    plain: bool = False,
) -> list[Plan]:  # fmt: skip
    """Returns the plans of the best settings, fastest first; those that are compiled fit by the compiler's word.

    Batch size, length and all that changes what is trained stay as `config` has them. Where nothing fits it is one plan, that
    comes nearest. Raises UserError where no layout can run `config`, with the nearest batch size that one can, and as `make_plan`.
    """
    estimated = estimated or machine.chip.platform != "tpu"
    with tracing_for(machine.chip.platform):
        tried = _Search(config, machine, base, tokens, log, plain)
        tried.plan(rows_and_heads(config, machine))
        tried.plan(mesh for best in tried.best() for mesh in over_experts(best, spec_of(base)))
        tried.plan(mesh for best in tried.best() for mesh in over_copies(best, machine.nodes))
    if not tried.plans:
        raise UserError(tried.why_none())
    found = sorted((plan for plan in tried.plans if plan.fits), key=lambda plan: (plan.roofline.seconds, plan.needed))
    if not found:
        return [min(tried.plans, key=lambda plan: plan.needed)]
    return found if estimated else _confirmed(found, base, log, plain)


def rows_and_heads(config: Config, machine: Machine) -> Iterator[Mesh]:
    """Yields layouts over `fsdp`, `tensor` and, of long rows, `context`, whether or not the batch divides over them; no copies."""
    length = config.data.max_length
    powers = [2**power for power in range(machine.devices.bit_length())]
    stretches = [size for size in powers if size == 1 or length // size >= _STRETCH] if length >= _LONG else [max(config.mesh.context, 1)]
    for tensor in _TENSOR:
        for context in stretches:
            left, rest = divmod(machine.devices, tensor * context)
            if left and not rest:
                yield {"data": 1, "fsdp": left, "expert": 1, "context": context, "tensor": tensor}


def over_experts(mesh: Mesh, spec: DecoderSpec) -> Iterator[Mesh]:
    """Yields layouts of a model of experts with these on several of the devices that a layout has along `fsdp`."""
    counts = [layer.mlp.count for layer in spec.layers if isinstance(layer.mlp, ExpertsSpec)]
    for power in range(1, mesh["fsdp"].bit_length()) if counts else ():
        expert = 2**power
        if mesh["fsdp"] % expert == 0 and math.gcd(*counts) % expert == 0:
            yield {**mesh, "fsdp": mesh["fsdp"] // expert, "expert": expert}


def over_copies(mesh: Mesh, nodes: int) -> Iterator[Mesh]:
    """Yields layouts with several copies of the parameters, along `data`: two, one a node, and one wherever a part was."""
    for data in sorted({2, nodes, mesh["fsdp"]} - {1}):
        if mesh["fsdp"] % data == 0:
            yield {**mesh, "data": data, "fsdp": mesh["fsdp"] // data}


class _Search:
    """The plans of layouts that were tried, by estimate, and why others were not."""

    def __init__(
        self, config: Config, machine: Machine, base: Source, tokens: float | None, log: Callable[[str], None], plain: bool
    ):  # fmt: skip
        self.config, self.machine, self.base, self.tokens, self.log = config, machine, base, tokens, log
        self.flags = compiler_flags(machine.chip.platform, plain)
        self.plans: list[Plan] = []
        self.refused: list[str] = []  # for which reasons
        self.uneven: list[Mesh] = []  # over which the rows of a batch do not divide
        self._work: Work | None = None
        self._flops: dict[tuple[str, bool], float] = {}

    def plan(self, meshes: Iterable[Mesh]) -> None:
        """Plans layouts with each remat policy."""
        for mesh in list(meshes):
            if self.config.train.batch_size % _groups(mesh):
                self.uneven.append(mesh)
                continue
            try:
                programs = self._programs(mesh, "full")
            except UserError as error:  # such as heads that `tensor` does not divide
                self.log(f"left out {mesh}: {error}")
                self.refused.append(str(error))
                continue
            if self._work is None:
                spec = programs.composed.abstract.spec
                self._work = work_of(self.config, spec.layers, spec.vocab_size, self.tokens, self.log)
            for remat in REMAT_POLICIES:
                if remat != "offload" or self.machine.chip.platform != "cpu":  # where nothing would move
                    self.plans.append(_largest(programs, self.machine, remat, self._work, self._flops_of(mesh, remat), self.flags))

    def best(self) -> list[Mesh]:
        """Returns the layouts of the best plans so far: those that fit by seconds, then by what they need."""
        ranked = sorted(self.plans, key=lambda plan: (not plan.fits, plan.roofline.seconds if plan.fits else plan.needed, plan.needed))
        meshes = {tuple(plan.mesh.items()): plan.mesh for plan in ranked}
        return list(meshes.values())[:_KEPT]

    def why_none(self) -> str:
        """Returns why no layout can run the configuration, and the nearest batch size that one can."""
        rows, machine = self.config.train.batch_size, self.machine
        near = sorted(self.uneven, key=lambda mesh: abs(rows - _nearest(rows, _groups(mesh))))
        for mesh in near[:_TRIED]:
            other = _nearest(rows, _groups(mesh))
            try:
                self._programs(mesh, "full", other)
            except UserError as error:
                self.refused.append(str(error))
                continue
            return (
                f"train.batch_size: {rows} rows divide over the {machine.devices} devices of {machine.name} in no layout that --auto tries; "
                f"choose {other}, the nearest that does, or a smaller machine."
            )
        if not self.refused:  # of short rows the configuration says over how many devices each is cut
            return f"mesh.context={self.config.mesh.context}: does not divide the {machine.devices} devices of {machine.name}; choose a divisor."
        return f"--auto: no layout of {machine.name} can run this. Of the first: {self.refused[0]}"

    def _programs(self, mesh: Mesh, remat: str, rows: int | None = None) -> Programs:
        groups = _groups(mesh)
        evaluation = dataclasses.replace(self.config.eval, batch_size=groups if self.config.data.eval else 0)
        train = dataclasses.replace(self.config.train, batch_size=rows or self.config.train.batch_size, micro_batch_size=groups)
        config = dataclasses.replace(
            self.config, mesh=dataclasses.replace(self.config.mesh, **mesh), model=dataclasses.replace(self.config.model, remat=remat),
            train=train, eval=evaluation,
        )  # fmt: skip
        return make_programs(config, self.base, mesh_of(config, self.machine, compiled=False), self.log)

    def _flops_of(self, mesh: Mesh, remat: str) -> float:
        """Returns the FLOPs of a step, which remat decides, and neither micro-batch nor layout but for experts on several devices.

        These compute a few rows more, by a share that is taken to be that of remat "full" with every policy: to trace a step
        takes the most of a search.
        """
        remat, spread = "full" if remat == "offload" else remat, mesh["expert"] > 1  # what is kept elsewhere is not computed again
        if (remat, spread) not in self._flops:
            if not spread or remat == "full":
                programs = self._programs(mesh, remat)
                traced = programs.train_step.trace(programs.state, programs.batch)
                self._flops[remat, spread] = count_flops(traced.jaxpr, loops_of(programs, self._work))
            else:
                alone = {**mesh, "fsdp": mesh["fsdp"] * mesh["expert"], "expert": 1}
                more = self._flops_of(mesh, "full") / self._flops_of(alone, "full")
                self._flops[remat, spread] = more * self._flops_of(alone, remat)
        return self._flops[remat, spread]


def overrides(plan: Plan) -> dict[str, Any]:
    """Returns the keys that were searched, with the values of a plan."""
    config = plan.config
    return {
        **{f"mesh.{name}": size for name, size in plan.mesh.items()},
        "model.remat": config.model.remat,
        "train.micro_batch_size": config.train.micro_batch_size,
        **({"eval.batch_size": config.eval.batch_size} if config.data.eval else {}),
    }


def _groups(mesh: dict[str, int]) -> int:
    """Returns into how many parts the rows of a batch are cut."""
    groups = 1
    for axis in LAYOUT["batch"]:
        groups *= mesh.get(axis, 1)
    return groups


def _nearest(rows: int, groups: int) -> int:
    """Returns the multiple of `groups` that is nearest to `rows`."""
    return max(round(rows / groups), 1) * groups


def _largest(programs: Programs, machine: Machine, remat: str, work: Work, flops: float, flags: Mapping[str, str]) -> Plan:
    """Returns the plan with the largest micro-batch that fits by estimate; with the smallest, where none does."""
    groups, rows = _groups(dict(programs.mesh.shape)), programs.composed.config.train.batch_size
    sizes = [size for size in range(groups, rows + 1, groups) if rows % size == 0]
    low, high = 0, len(sizes) - 1
    best = estimated_plan(_resized(programs, sizes[0], remat), machine, work, flops, flags)
    while best.fits and low < high:
        middle = (low + high + 1) // 2
        plan = estimated_plan(_resized(programs, sizes[middle], remat), machine, work, flops, flags)
        if plan.fits:
            low, best = middle, plan
        else:
            high = middle - 1
    return best


def _resized(programs: Programs, micro: int, remat: str) -> Programs:
    """Returns the programs in shapes with another micro-batch and remat policy, for an estimate."""
    composed = programs.composed
    config = dataclasses.replace(
        composed.config, model=dataclasses.replace(composed.config.model, remat=remat),
        train=dataclasses.replace(composed.config.train, micro_batch_size=micro),
    )  # fmt: skip
    options = dataclasses.replace(composed.options, remat=remat)
    batch = batch_shapes(config, programs.mesh, config.train.batch_size // micro, micro)
    return dataclasses.replace(programs, composed=dataclasses.replace(composed, config=config, options=options), batch=batch)


def _confirmed(found: list[Plan], base: Source, log: Callable[[str], None], plain: bool) -> list[Plan]:
    """Returns the first plans that fit when they are compiled; one that does not is tried with half the rows at a time."""
    confirmed: list[Plan] = []
    waiting = list(found)
    while waiting and len(confirmed) < _COMPILED:
        tried = waiting.pop(0)
        log(f"compiling {overrides(tried)}")
        plan = make_plan(tried.config, tried.machine, base, tried.work, log=log, plain=plain)
        if plan.fits:
            confirmed.append(plan)
            continue
        micro, groups = tried.config.train.micro_batch_size, _groups(tried.mesh)
        if micro % 2 == 0 and micro // 2 % groups == 0:
            train = dataclasses.replace(tried.config.train, micro_batch_size=micro // 2)
            waiting.insert(0, dataclasses.replace(tried, config=dataclasses.replace(tried.config, train=train)))
        elif not waiting and not confirmed:
            return [plan]
    return sorted(confirmed, key=lambda plan: plan.roofline.seconds)
