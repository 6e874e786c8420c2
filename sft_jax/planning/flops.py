"""FLOPs of a program, from its jaxpr: matrix products, loops counted.

XLA's own count takes the body of a loop once. What is computed again in the backward pass (remat) is counted, since a chip
computes it; so this is more than the model FLOPs of which MFU is made. Elementwise work is left out: it is less than a
hundredth, and hidden behind reading and writing memory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr

SCOPES = ("attention", "cross_entropy")  # loops whose trip count is known on the device only, by the name of their scope
ACCUMULATION = "accumulation"  # the scope of the loop over micro-batches, whose trip count is hidden from the compiler


@dataclass(frozen=True)
class Loops:
    """How often the loops run whose trip counts are known on the device only: an assumption, or a mean over the data."""

    attention: float  # key blocks that a block of queries looks at
    cross_entropy: float  # chunks of supervised positions
    micro_batches: float = 1.0

    def of(self, scope: str) -> float:
        """Returns the trips of the loop inside a scope, such as "jit(train_step)/attention/while"; 1 of others."""
        for name in SCOPES:
            if name in scope:
                return getattr(self, name)
        return self.micro_batches if scope.removesuffix("/while").endswith(ACCUMULATION) else 1.0


def count_flops(closed: ClosedJaxpr, loops: Loops) -> float:
    """Returns the FLOPs of the matrix products of a program over all devices.

    Inside `shard_map` shapes are those of one device, so there they count as often as the mesh has devices.
    """
    return _count(closed.jaxpr, loops, "")


def _count(jaxpr, loops: Loops, scope: str) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        here = f"{scope}/{eqn.source_info.name_stack}"
        if name in FLOPS:
            total += FLOPS[name](eqn)
            continue
        if name == "pallas_call":
            total += _pallas(eqn, loops)
            continue
        inner = list(_inner(eqn.params))
        if not inner:
            continue
        counts = [_count(jaxpr, loops, here) for jaxpr in inner]
        if name == "scan":
            total += eqn.params["length"] * sum(counts)
        elif name == "while":
            total += loops.of(here) * sum(counts)
        elif name == "cond":
            total += max(counts)
        elif name == "shard_map":
            total += math.prod(eqn.params["mesh"].shape.values()) * sum(counts)
        else:
            total += sum(counts)
    return total


def _pallas(eqn, loops: Loops) -> float:
    """Returns the FLOPs that a kernel says it has, else those of its body at every point of its grid."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return float(estimate.flops)
    return math.prod(eqn.params["grid_mapping"].grid) * _count(eqn.params["jaxpr"], loops, "")


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Returns the jaxprs among the parameters of an operation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                yield item.jaxpr


def _dot_general(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged_dot(eqn) -> float:
    """Rows [m, k] times one of several [k, n] for each: as many products as rows, whatever their groups."""
    left, right = (variable.aval.shape for variable in eqn.invars[:2])
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        return 2.0 * math.prod(left) * right[-1]
    (contracted, _), _ = numbers.dot_dimension_numbers
    if numbers.lhs_ragged_dimensions[0] in contracted:  # the gradient of the kernels: each row counts in one group only
        free = math.prod(size for axis, size in enumerate(right) if axis not in numbers.dot_dimension_numbers[0][1])
        return 2.0 * math.prod(left) * free
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


FLOPS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
}
