"""What would make a plan fit that does not. Each way is planned by estimate, so that whoever follows one has a run that fits.

First what leaves the result as it is, the fewest changes that are enough; then, where that is not enough on this machine, what
changes how the model is trained, on top of it; and the smallest machine of the kind on which nothing else need change.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sft_jax.config import Config, to_dict
from sft_jax.config_parsing import parse_config
from sft_jax.errors import UserError
from sft_jax.hf.source import Source
from sft_jax.model.platform import tracing_for
from sft_jax.planning.estimate import estimate, estimate_evaluation
from sft_jax.planning.launcher import gathers_ahead
from sft_jax.planning.machines import GIB, Machine, larger, machine
from sft_jax.planning.memory import held
from sft_jax.planning.planner import Plan, as_overrides
from sft_jax.planning.program import make_programs, mesh_of

Settings = dict[str, Any]

_SPARE = 0.9  # share of the memory that an estimate may take, since it can be a tenth off
_AXES = ("tensor", "context")  # that cut activations further than rows do
# What changes training, the least first; a pair where each alone is refused or not enough.
_CHANGES: tuple[tuple[Settings, str], ...] = (
    ({"model.dtype": "bfloat16"}, "parameters and optimizer state in half the bytes"),
    ({"optim.name": "adafactor"}, "its state is far smaller"),
    ({"adapter.name": "lora"}, "trains an adapter: no gradient and no optimizer state of the base"),
    ({"adapter.name": "lora", "model.dtype": "bfloat16"}, "trains an adapter on a base in 16 bits"),
    ({"adapter.base_dtype": "nf4"}, "the base in four bits"),
    ({"adapter.name": "lora", "model.dtype": "bfloat16", "adapter.base_dtype": "nf4"}, "trains an adapter on a base in four bits"),
)


@dataclass(frozen=True)
class Remedy:
    """One way to make the run fit."""

    settings: Settings  # keys to set beside those of the plan
    machine: Machine
    needed: int  # bytes of each device, by estimate
    told: str
    plain: bool = False  # without the launchers' flags for TPUs

    def flags(self, plan: Plan) -> str:
        """Returns what to put behind the command of the plan."""
        there = "" if self.machine.name == plan.machine.name else f"--topology {self.machine.name}"
        if self.machine.kind == "cpu" and self.machine.chip.memory != plan.machine.chip.memory:
            there = f"--memory-gib {self.machine.chip.memory / GIB:.0f}"
        return " ".join(filter(None, (there, as_overrides(self.settings), "--plain" if self.plain else "")))

    def to_dict(self, plan: Plan) -> dict[str, Any]:
        return {
            "settings": self.settings, "environment": {"SFT_JAX_OVERLAP": "0"} if self.plain else {}, "machine": self.machine.name,
            "needed_bytes": self.needed, "flags": self.flags(plan), "told": self.told,
        }  # fmt: skip


def remedies(plan: Plan, base: Source) -> list[Remedy]:
    """Returns ways to make `plan` fit, those first that cost least; nothing where the plan fits or none is known."""
    if plan.fits:
        return []
    if plan.train.fits and plan.train.needed + plan.machine.chip.process <= plan.machine.chip.memory:
        return _for_evaluation(plan)
    with tracing_for(plan.machine.chip.platform):
        same = _that_keep_the_result(plan, base)
        return [*same, *([] if same else _that_change_training(plan, base)), *_larger_machines(plan, base)]


def with_settings(config: Config, settings: Settings) -> Config:
    """Returns `config` with keys set. Raises UserError where it is refused then."""
    raw = to_dict(config)
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        raw[section][name] = value
    return parse_config(raw, needs_data=False)


def _needed(config: Config, settings: Settings, on: Machine, base: Source, flags: Mapping[str, str]) -> int | None:
    """Returns the bytes that a device needs with these settings, by estimate; None where the run would be refused."""
    try:
        config = with_settings(config, settings)
        programs = make_programs(config, base, mesh_of(config, on, compiled=False), lambda text: None)
    except UserError:
        return None
    size = held(programs)
    needed = estimate(programs, size, on, flags).needed
    if config.data.eval:
        needed = max(needed, estimate_evaluation(programs, size, on).needed + size.optimizer + size.average)
    return needed + int(on.chip.process)


def _try(plan: Plan, base: Source, settings: Settings, told: str, on: Machine | None = None, plain: bool = False) -> Remedy | None:
    """Returns the remedy, if it is one."""
    on = on or plan.machine
    needed = _needed(plan.config, settings, on, base, {} if plain else plan.flags)
    return Remedy(settings, on, needed, told, plain) if needed is not None and needed <= _SPARE * on.chip.memory else None


def _that_keep_the_result(plan: Plan, base: Source) -> list[Remedy]:
    """Returns the remedies with the fewest changes: of layout, remat and rows at a time, or without layers gathered ahead."""
    told = "the result stays the same"
    parts: list[Settings | str] = []
    if plan.mesh["data"] > 1:
        parts.append({"mesh.data": 1, "mesh.fsdp": -1})  # parameters are cut over devices, and not copied
    if plan.config.model.remat != "full":
        parts.append({"model.remat": "full"})
    sizes = [{"train.micro_batch_size": rows} for rows in _fewer_rows(plan)]
    parts += ["rows", "plain"] if gathers_ahead(plan.flags) else ["rows"]
    for count in range(1, len(parts) + 1):
        found = []
        for chosen in itertools.combinations(parts, count):
            plain = "plain" in chosen
            how = f"{told}; nothing is gathered ahead: start it with SFT_JAX_OVERLAP=0" if plain else told
            fixed = {key: value for part in chosen if not isinstance(part, str) for key, value in part.items()}
            for size in sizes if "rows" in chosen else [{}]:  # the most rows first
                if remedy := _try(plan, base, {**fixed, **size}, how, plain=plain):
                    found.append(remedy)
                    break
        if found:
            return found
    for layout in _layouts(plan, plan.machine):
        if remedy := _try(plan, base, {**_frugal(plan), **layout}, told):
            return [remedy]
    return []


def _layouts(plan: Plan, on: Machine) -> Iterator[Settings]:
    """Yields layouts of a machine that cut rows further than into one a device, each with one row a device at a time."""
    for axis, pieces in itertools.product(_AXES, (2, 4, 8)):
        sizes = {"tensor": plan.mesh["tensor"], "context": plan.mesh["context"], axis: pieces}
        groups, rest = divmod(on.devices, math.prod(sizes.values()))
        if plan.mesh[axis] < pieces and not rest and plan.config.train.batch_size % groups == 0:
            yield {"mesh.data": 1, "mesh.fsdp": -1, f"mesh.{axis}": pieces, "train.micro_batch_size": groups}


def _fewer_rows(plan: Plan) -> Iterator[int]:
    """Yields smaller micro-batches that the mesh and the batch can have, the largest first."""
    train = plan.config.train
    groups = plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["expert"]
    now = train.micro_batch_size or train.batch_size
    for rows in range(now - now % groups, 0, -groups):
        if rows < now and train.batch_size % rows == 0:
            yield rows


def _frugal(plan: Plan) -> Settings:
    """Returns what keeps the result and needs the least, before other axes are used."""
    rows = [*_fewer_rows(plan)][-1:]
    return {
        **({"mesh.data": 1, "mesh.fsdp": -1} if plan.mesh["data"] > 1 or plan.mesh["fsdp"] > 1 else {}),
        **({"model.remat": "full"} if plan.config.model.remat != "full" else {}),
        **({"train.micro_batch_size": rows[0]} if rows else {}),
    }


def _that_change_training(plan: Plan, base: Source) -> list[Remedy]:
    """Returns the remedies that train otherwise, on top of all that keeps the result; none that another one is part of."""
    found: list[Remedy] = []
    length, frugal = plan.config.data.max_length, _frugal(plan)
    shorter = (({"data.max_length": rows}, "shorter rows") for rows in (length // 2, length // 4) if rows >= 512)
    for change, told in itertools.chain(_CHANGES, shorter):
        new = {key: value for key, value in change.items() if _now(plan.config, key) != value}
        if not new or any(known.settings.items() <= {**frugal, **new}.items() for known in found):
            continue
        if remedy := _try(plan, base, {**frugal, **new}, told):
            found.append(remedy)
    return found


def _now(config: Config, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return getattr(getattr(config, section), name)


def _larger_machines(plan: Plan, base: Source) -> list[Remedy]:
    """Returns the smallest machine of the kind on which only the layout need change."""
    if plan.machine.kind == "cpu":
        memory = plan.needed / _SPARE / GIB
        return [Remedy({}, machine("cpu", float(int(memory) + 1)), plan.needed, "a host with more memory")]
    for bigger in larger(plan.machine):
        told = f"{bigger.devices} devices instead of {plan.machine.devices}; the result stays the same"
        groups = bigger.devices // (plan.mesh["context"] * plan.mesh["tensor"])
        rows = max(plan.config.train.micro_batch_size or plan.config.train.batch_size, groups)
        layouts = [{"mesh.data": 1, "mesh.fsdp": -1, "train.micro_batch_size": rows}, *_layouts(plan, bigger)]
        for layout, remat in itertools.product(layouts, dict.fromkeys((plan.config.model.remat, "full"))):
            settings = {**layout, "model.remat": remat}
            settings = {key: value for key, value in settings.items() if _now(plan.config, key) != value}
            if remedy := _try(plan, base, settings, told, bigger):
                return [remedy]
    return []


def _for_evaluation(plan: Plan) -> list[Remedy]:
    """Returns fewer rows at a time in evaluations, where only these do not fit: what they take grows with their rows."""
    assert plan.evaluation is not None
    now = plan.config.eval.batch_size or plan.config.train.micro_batch_size or plan.config.train.batch_size
    groups = plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["expert"]
    fixed = plan.evaluation_needed - plan.evaluation.temporaries
    for rows in range((now - 1) // groups * groups, 0, -groups):
        needed = fixed + plan.evaluation.temporaries * rows // now
        if needed <= _SPARE * plan.machine.chip.memory:
            return [Remedy({"eval.batch_size": rows}, plan.machine, needed, f"evaluations alone do not fit, with {now} rows at a time")]
    return []
