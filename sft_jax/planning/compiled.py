"""Compiling a program for devices that are not there, and keeping what was learned of it.

What is kept is a few numbers and the collectives, in the user's cache folder, by the lowered program, the machine, and the
versions and flags of the compiler: the same plan made again takes seconds.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import jax

from sft_jax.data.cache import default_cache
from sft_jax.errors import UserError
from sft_jax.planning.between_slices import between_slices
from sft_jax.planning.collectives import Collective, collectives
from sft_jax.planning.hlo import Instruction, Program
from sft_jax.planning.whole_arrays import Limits, whole_arrays

_FORMAT = 4  # of what is kept
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, in bytes of each device."""

    fits: bool
    arguments: int  # state and batch
    temporaries: int
    outputs: int  # beyond those that take the place of arguments
    code: int
    limit: int | None  # what the compiler would have allowed, where it did not fit
    largest: tuple[str, ...]  # the largest allocations, where it did not fit
    collectives: tuple[Collective, ...]
    whole: tuple[str, ...]  # arrays that no device should hold whole, see sft_jax.planning.whole_arrays

    @property
    def needed(self) -> int:
        """All that the program needs while it runs."""
        return self.arguments + self.temporaries + self.outputs + self.code


def compile_program(
    lowered: jax.stages.Lowered, machine: str, devices: int, arguments: int, trips_of: Callable[[Instruction], float],
    limits: Limits, flags: Mapping[str, str],
) -> Compiled:  # fmt: skip
    """Returns what the compiler says of `lowered`, a program for `devices` devices whose arguments take so many bytes of each.

    `flags` are options of the compiler, see sft_jax.planning.launcher.
    A program that does not fit is no error. Raises UserError where the compiler fails otherwise.
    """
    folder = default_cache() / "plans"
    kept = folder / f"{_key(lowered, machine, devices, flags)}.json"
    if kept.is_file():
        return _from_dict(json.loads(kept.read_text()))
    try:
        compiled = lowered.compile(compiler_options=dict(flags) or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            reason = " ".join(str(error).split())[:400]
            raise UserError(
                f"--topology: {machine}: the compiler fails on this program ({reason}). Try another mesh or model.remat."
            ) from error
        result = _not_fitting(str(error), arguments)
    else:
        stats = compiled.memory_analysis()
        text = compiled.as_text()
        found = _all_collectives(Program(text), devices, trips_of)
        result = Compiled(
            fits=True, arguments=stats.argument_size_in_bytes, temporaries=stats.temp_size_in_bytes,
            outputs=max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0), code=stats.generated_code_size_in_bytes,
            limit=None, largest=(), collectives=tuple(found), whole=tuple(whole_arrays(text, found, limits)),
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(result)))
    temporary.replace(kept)
    return result


def _all_collectives(program: Program, devices: int, trips_of: Callable[[Instruction], float]) -> list[Collective]:
    """Returns what devices send each other inside their slices and between them, what sends the most bytes first."""
    found = [*collectives(program, devices, trips_of), *between_slices(program, program.executions(trips_of))]
    return sorted(found, key=lambda one: -one.total)


def _key(lowered: jax.stages.Lowered, machine: str, devices: int, flags: Mapping[str, str]) -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib")]
    try:
        versions.append(f"libtpu {metadata.version('libtpu')}")
    except metadata.PackageNotFoundError:
        pass
    chosen = [f"{name}={value}" for name, value in sorted(flags.items())]
    text = "\n".join([str(_FORMAT), machine, str(devices), *versions, os.environ.get("LIBTPU_INIT_ARGS", ""), *chosen, lowered.as_text()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _from_dict(values: dict[str, Any]) -> Compiled:
    found = tuple(Collective(**{**one, "shape": tuple(one["shape"])}) for one in values.pop("collectives"))
    texts = {name: tuple(values.pop(name)) for name in ("largest", "whole")}
    return Compiled(**values, **texts, collectives=found)


def _not_fitting(message: str, arguments: int) -> Compiled:
    """Returns what the compiler's message says: how much was needed, of how much, and for what.

    Such as "Used 41.62G of 15.75G hbm. Exceeded hbm capacity by 25.87G", with a list of allocations behind it.
    """
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if found:
        used, limit = float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
    else:
        found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
        if found is None:
            raise UserError(f"the compiler ran out of memory in a way that is not understood: {' '.join(message.split())[:400]}")
        used, limit = float(found[1]) * _UNITS[found[2]] + arguments, float(found[3]) * _UNITS[found[4]]
    pattern = r"Size: ([\d.]+[KMGT]?B?)\s+(?:Operator: op_name=\"([^\"]*)\")?.*?Shape: (\S+?)\{"
    allocations = [f"{size} {shape} {name}".strip() for size, name, shape in re.findall(pattern, message, re.DOTALL)]
    return Compiled(False, arguments, int(used) - arguments, 0, 0, int(limit), tuple(allocations[:5]), (), ())
