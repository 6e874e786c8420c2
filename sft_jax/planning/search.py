"""The fastest settings that fit a machine: layout, remat and micro-batch, which change how a run computes and not what.

Settings are ranked by estimate; for each layout and remat policy the largest micro-batch that fits is found by bisection. Then
the best are compiled, where there is a compiler, until enough of them fit.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.hf.source import Source
from sft_jax.model.decoder import REMAT_POLICIES
from sft_jax.model.platform import tracing_for
from sft_jax.model.sharding import LAYOUT
from sft_jax.planning.flops import count_flops
from sft_jax.planning.machines import Machine
from sft_jax.planning.planner import Plan, estimated_plan, loops_of, make_plan
from sft_jax.planning.program import Programs, batch_shapes, make_programs, mesh_of
from sft_jax.planning.work import Work, work_of

_TENSOR = (1, 2, 4, 8)  # more than the chips of a host talk too slowly for it
_COMPILED = 3  # plans that are shown, each compiled


def search(
    config: Config, machine: Machine, base: Source, tokens: float | None, estimated: bool, log: Callable[[str], None]
) -> list[Plan]:
    """Returns the plans of the best settings, fastest first; those that are compiled fit by the compiler's word.

    Batch size, length and all that changes what is trained stay as `config` has them. Raises UserError where nothing fits,
    with what comes nearest, and as `make_plan`.
    """
    estimated = estimated or machine.chip.platform != "tpu"
    found: list[Plan] = []
    nearest: Plan | None = None
    work: Work | None = None
    flops: dict[str, float] = {}
    with tracing_for(machine.chip.platform):
        for mesh in layouts(config, machine):
            try:
                programs = _programs(config, machine, base, mesh, "full", log)
            except UserError as error:  # such as heads that `tensor` does not divide
                log(f"left out {mesh}: {error}")
                continue
            spec = programs.composed.abstract.spec
            work = work_of(config, spec.layers, spec.vocab_size, tokens, log) if work is None else work
            for remat in (name for name in REMAT_POLICIES if name != "offload"):  # no machine's link to its host is known here
                if remat not in flops:
                    flops[remat] = _flops(_programs(config, machine, base, mesh, remat, log), work)
                best = _largest(programs, machine, remat, work, flops[remat])
                found += [best] if best.fits else []
                nearest = min(filter(None, (nearest, best)), key=lambda plan: plan.needed)
    found.sort(key=lambda plan: (plan.roofline.seconds, plan.needed))
    if not found and nearest is not None:
        return [nearest]
    return found if estimated else _confirmed(found, base, log)


def layouts(config: Config, machine: Machine) -> Iterator[dict[str, int]]:
    """Yields the meshes that are tried: rows over `data` and `fsdp`, heads over `tensor`; other axes as they are."""
    sizes = vars(config.mesh)
    others = {name: size for name, size in sizes.items() if name not in ("data", "fsdp", "tensor") and size != -1}
    taken = 1
    for size in others.values():
        taken *= size
    for tensor in _TENSOR:
        left = machine.devices // taken // tensor
        if left < 1 or left * taken * tensor != machine.devices:
            continue
        for data in sorted({1, 2, left}):
            if left % data == 0 and config.train.batch_size % (left * others.get("expert", 1)) == 0:
                yield {**others, "data": data, "fsdp": left // data, "tensor": tensor}


def overrides(plan: Plan) -> dict[str, Any]:
    """Returns the keys that were searched, with the values of a plan."""
    config = plan.config
    return {
        **{f"mesh.{name}": size for name, size in plan.mesh.items()},
        "model.remat": config.model.remat,
        "train.micro_batch_size": config.train.micro_batch_size,
        **({"eval.batch_size": config.eval.batch_size} if config.data.eval else {}),
    }


def _programs(config: Config, machine: Machine, base: Source, mesh: dict[str, int], remat: str, log) -> Programs:
    groups = _groups(mesh)
    evaluation = dataclasses.replace(config.eval, batch_size=groups if config.data.eval else 0)
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, **mesh), model=dataclasses.replace(config.model, remat=remat),
        train=dataclasses.replace(config.train, micro_batch_size=groups), eval=evaluation,
    )  # fmt: skip
    return make_programs(config, base, mesh_of(config, machine, compiled=False), log)


def _groups(mesh: dict[str, int]) -> int:
    """Returns into how many parts the rows of a batch are cut."""
    groups = 1
    for axis in LAYOUT["batch"]:
        groups *= mesh.get(axis, 1)
    return groups


def _flops(programs: Programs, work: Work) -> float:
    """Returns the FLOPs of a step, which remat decides, and neither layout nor micro-batch."""
    traced = programs.train_step.trace(programs.state, programs.batch)
    return count_flops(traced.jaxpr, loops_of(programs, work))


def _largest(programs: Programs, machine: Machine, remat: str, work: Work, flops: float) -> Plan:
    """Returns the plan with the largest micro-batch that fits by estimate; with the smallest, where none does."""
    groups, rows = _groups(dict(programs.mesh.shape)), programs.composed.config.train.batch_size
    sizes = [size for size in range(groups, rows + 1, groups) if rows % size == 0]
    low, high = 0, len(sizes) - 1
    best = estimated_plan(_resized(programs, sizes[0], remat), machine, work, flops)
    while best.fits and low < high:
        middle = (low + high + 1) // 2
        plan = estimated_plan(_resized(programs, sizes[middle], remat), machine, work, flops)
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


def _confirmed(found: list[Plan], base: Source, log: Callable[[str], None]) -> list[Plan]:
    """Returns the first plans that fit when they are compiled; one that does not is tried with half the rows at a time."""
    confirmed: list[Plan] = []
    waiting = list(found)
    while waiting and len(confirmed) < _COMPILED:
        tried = waiting.pop(0)
        log(f"compiling {overrides(tried)}")
        plan = make_plan(tried.config, tried.machine, base, tried.work, log=log)
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
