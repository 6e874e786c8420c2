"""A plan for people, as lines of text, and for programs, as a dict."""

import collections
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sft_jax.planning.machines import GIB
from sft_jax.planning.planner import Plan, as_overrides, describe_mesh
from sft_jax.planning.remedies import Remedy
from sft_jax.planning.search import overrides


def size_of(count: float) -> str:
    """Returns bytes as text, such as "12.34 GiB"."""
    unit, name = (GIB, "GiB") if abs(count) >= 0.1 * GIB else (2**20, "MiB")
    return f"{count / unit:,.2f} {name}"


_SHOWN = 8  # plans of a search
_EXPOSED = 5  # operations that wait for devices


def memory_rows(plan: Plan) -> dict[str, int]:
    """Returns the bytes of each device by what they are for; they add up to what the train step needs, and on a CPU its process.

    Gradients and logits follow from shapes; activations are what the compiler wants beside them.
    """
    held, train = plan.held, plan.train
    gradients = min(held.gradients, train.temporaries)
    logits = min(held.logits, train.temporaries - gradients)
    return {
        "parameters": held.trained,
        "frozen parameters": held.frozen,
        "optimizer": held.optimizer,
        "average": held.average,
        "gradients": gradients,
        "logits of a chunk": logits,
        "activations": train.temporaries - gradients - logits,
        "batch, outputs, code": train.needed - held.state - train.temporaries,
        "process": int(plan.machine.chip.process),
    }


def cost(plan: Plan, efficiency: float, price: float | None) -> dict[str, float | None]:
    """Returns seconds of a step, tokens/s, MFU, hours, device-hours and price at a share `efficiency` of the roofline."""
    seconds = plan.roofline.seconds / efficiency
    devices, steps = plan.machine.devices, plan.work.steps
    hours = None if steps is None else steps * seconds / 3600
    device_hours = None if hours is None else hours * devices
    return {
        "roofline_seconds": plan.roofline.seconds,
        "step_seconds": seconds,
        "tokens_per_second": plan.config.train.batch_size * plan.work.tokens / seconds,
        "mfu": plan.model_flops / seconds / devices / plan.machine.chip.flops,
        "hours": hours,
        "device_hours": device_hours,
        "price": None if price is None or device_hours is None else price * device_hours,
    }


def by_kind(plan: Plan) -> dict[str, dict[str, float]]:
    """Returns for each kind of collective the bytes that reach a device in a step, and how many of them nothing hides."""
    kinds: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"bytes": 0.0, "exposed": 0.0, "count": 0.0})
    for one in plan.train.collectives:
        kinds[one.kind]["bytes"] += one.total
        kinds[one.kind]["exposed"] += 0 if one.overlapped else one.total
        kinds[one.kind]["count"] += one.times
    return dict(kinds)


def network_bytes(plan: Plan) -> float:
    """Returns the bytes that reach a device in a step from other slices or nodes, over its share of the network."""
    return sum(one.across * one.times for one in plan.train.collectives)


def most_exposed(plan: Plan) -> list[dict[str, Any]]:
    """Returns the collectives that nothing hides and that send the most in a step, added up by kind and by the operation they belong to."""
    totals: dict[tuple[str, str, int], dict[str, float]] = collections.defaultdict(lambda: {"bytes": 0.0, "count": 0.0})
    for one in plan.train.collectives:
        if not one.overlapped and one.total:
            sums = totals[one.kind, one.operation, one.devices]
            sums["bytes"] += one.total
            sums["count"] += one.times
    found = [{"kind": kind, "operation": name, "devices": devices, **sums} for (kind, name, devices), sums in totals.items()]
    return sorted(found, key=lambda one: -one["bytes"])[:_EXPOSED]


def to_dict(plan: Plan, efficiency: float, price: float | None, found: Sequence[Remedy] = ()) -> dict[str, Any]:
    """Returns the plan for `--json`; `found` are the remedies of one that does not fit."""
    return {
        "fits": plan.fits,
        "estimated": plan.estimated,
        "machine": plan.machine.name,
        "devices": plan.machine.devices,
        "mesh": plan.mesh,
        "compiler_flags": [f"{name}={value}" for name, value in plan.flags.items()],
        "needed_bytes": plan.needed,
        "usable_bytes": int(plan.machine.chip.memory),
        "room_bytes": plan.room,
        "memory": memory_rows(plan),
        "whole_arrays": None if plan.estimated else list(plan.whole),  # an estimate has no program in which to look for them
        "evaluation_bytes": plan.evaluation_needed or None,
        "flops": plan.flops,
        "model_flops": plan.model_flops,
        "collectives": by_kind(plan),
        "network_bytes": network_bytes(plan),
        "most_exposed": most_exposed(plan),
        "roofline": {**asdict(plan.roofline), "bound": plan.roofline.bound},
        "work": asdict(plan.work),
        **cost(plan, efficiency, price),
        "remedies": [remedy.to_dict(plan) for remedy in found],
    }  # fmt: skip


def lines(plan: Plan, efficiency: float, price: float | None, found: Sequence[Remedy] = ()) -> list[str]:
    """Returns the plan as text; `found` are the remedies of one that does not fit."""
    train, config = plan.config.train, plan.config
    micro = train.micro_batch_size or train.batch_size
    settings = f"{train.batch_size} rows of {config.data.max_length}, {micro} at a time, remat {config.model.remat}"
    out = [plan.machine.describe(), f"Mesh: {describe_mesh(plan.mesh)}. A step: {settings}.", ""]
    out.append(
        f"{'FITS' if plan.fits else 'DOES NOT FIT'}: {size_of(plan.needed)} of {size_of(plan.machine.chip.memory)} on each device, "
        f"{size_of(abs(plan.room))} {'left' if plan.room >= 0 else 'missing'}{', by estimate' if plan.estimated else ''}."
    )
    for name, size in memory_rows(plan).items():
        if size:
            out.append(f"  {name:24}{size_of(size):>14}")
    if plan.evaluation is not None:
        out.append(f"  {'an evaluation needs':24}{size_of(plan.evaluation_needed):>14}")
    if not plan.fits:
        out += [f"  largest: {text}" for text in plan.train.largest]
        return out + ["", *_advice(plan, found)]
    out += ["", f"Work: {plan.work.told}.",
            f"A step: {plan.flops:.3g} FLOPs, {plan.model_flops:.3g} without what is computed again."]  # fmt: skip
    for kind, sizes in by_kind(plan).items():
        hidden = "all overlapped" if not sizes["exposed"] else f"{size_of(sizes['exposed'])} not overlapped"
        out.append(f"  {kind:24}{size_of(sizes['bytes']):>14} to each device, {sizes['count']:,.0f} of them, {hidden}")
    if plan.machine.nodes > 1:
        out.append(f"  {'over the network':24}{size_of(network_bytes(plan)):>14} of these, between {plan.machine.nodes} {plan.machine.name_of_nodes}")
    for one in most_exposed(plan):
        name, times = one["operation"] or "no operation of the step: the compiler's own", f"{one['count']:,.0f} of them"
        out.append(f"  not overlapped: {size_of(one['bytes'])} of {one['kind']} over {one['devices']} devices, {times}, in {name}")
    out += [f"  WASTE: {text}" for text in plan.whole]
    roof, costs = plan.roofline, cost(plan, efficiency, price)
    out += [
        "",
        f"Roofline: {roof.seconds:.3g} s a step, bound by {roof.bound} (arithmetic {roof.compute:.3g} s, memory {roof.memory:.3g} s, "
        f"links {roof.overlapped:.3g} s overlapped and {roof.exposed:.3g} s not{f', host {roof.host:.3g} s' if roof.host else ''}).",
        f"At {efficiency:.0%} of it: {costs['step_seconds']:.3g} s a step, {costs['tokens_per_second']:,.0f} real tokens/s, "
        f"MFU {costs['mfu']:.1%}.",
    ]
    if costs["hours"] is not None:
        told = f", {costs['price']:,.2f} at {price:g} a device-hour" if costs["price"] is not None else ""
        out.append(f"The run: {plan.work.steps:,} steps, {costs['hours']:.3g} hours, {costs['device_hours']:.3g} device-hours{told}.")
    return out


def _advice(plan: Plan, found: Sequence[Remedy]) -> list[str]:
    if not found:
        return ["Nothing is known that would make it fit: rows at a time, remat, adapters and larger machines of this kind were tried."]
    ways = (f"  {one.flags(plan)}  ({size_of(one.needed)} of {size_of(one.machine.chip.memory)}; {one.told})" for one in found)
    return ["Each of these would make it fit, by estimate:", *ways]


def comparison(plans: list[Plan], efficiency: float) -> list[str]:
    """Returns a table of plans, one a line, and the settings of the first one as flags."""
    out = [f"{'mesh':32}{'remat':7}{'rows at a time':>15}{'of':>5}{'memory':>14}{'s a step':>10}{'tokens/s':>12}"]
    for plan in plans[:_SHOWN]:
        train, costs = plan.config.train, cost(plan, efficiency, None)
        out.append(
            f"{describe_mesh(plan.mesh):32}{plan.config.model.remat:7}{train.micro_batch_size:>15}{train.batch_size:>5}"
            f"{size_of(plan.needed):>14}{costs['step_seconds']:>10.3g}{costs['tokens_per_second']:>12,.0f}"
        )
    return [*out, "", f"Best: {as_overrides(overrides(plans[0]))}", ""]
