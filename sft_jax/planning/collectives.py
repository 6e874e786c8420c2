"""What devices send each other in a step: read from the compiled program, with the loops around it counted."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sft_jax.planning.hlo import Instruction, Program, array_bytes, array_dtypes, array_elements, array_shapes

_DIRECT = ("all-to-all", "ragged-all-to-all")  # every device has something else for every other one
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: str
    bytes: float  # that reach a device each time, by a ring algorithm
    times: float  # in a step
    overlapped: bool  # with computation, by the compiler's schedule
    devices: int  # of a group
    largest: int  # bytes of its largest array, whole
    elements: int  # numbers in that array
    operation: str  # path of what it belongs to
    dtype: str = ""  # of that array as XLA writes it, such as "bf16"
    shape: tuple[int, ...] = ()  # of that array; of a reduce-scatter that of a device's part
    nodes: int = 1  # over which a group lies, with as many of its devices in each; of TPUs one slice

    @property
    def total(self) -> float:
        return self.bytes * self.times

    @property
    def inside(self) -> float:
        """Bytes that reach a device each time over the links inside its node.

        Over several nodes a collective is taken to be hierarchical ("How to Scale Your Model", chapter on GPUs): devices of the same
        place in each node exchange over the network, each a part of the array, and the devices of a node share what has arrived.
        """
        if self.nodes == 1:
            return self.bytes
        members = self.devices / self.nodes
        return self._whole * (members - 1) / (self.devices if self.kind in _DIRECT else members)

    @property
    def across(self) -> float:
        """Bytes that reach a device each time through its share of its node's network cards: what comes from other nodes comes once."""
        if self.nodes == 1:
            return 0.0
        from_others = self._whole * (self.nodes - 1) / self.nodes
        return from_others if self.kind in _DIRECT else from_others * self.nodes / self.devices

    @property
    def _whole(self) -> float:
        return self.bytes * self.devices / (self.devices - 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def collectives(program: Program, devices: int, trips_of: Callable[[Instruction], float]) -> list[Collective]:
    """Returns the collectives of a program for `devices` devices, those with the most bytes first."""
    times = program.executions(trips_of)
    begun = {line.computation for line in program.instructions() if 'custom_call_target="AsyncCollectiveStart"' in line.text}
    ended = {line.computation for line in program.instructions() if 'custom_call_target="AsyncCollectiveDone"' in line.text}
    asynchronous = begun | {name for name in program.computations if name.startswith("async_collective_fusion")}
    lines = [line for line in program.instructions() if line.opcode.removesuffix("-start") in KINDS]
    # Where a collective begins. A schedule may put the pieces that follow into a loop inside, where they are none of their own.
    homes: dict[str, set[str]] = {}
    for line in lines:
        if line.computation in begun or line.computation not in asynchronous | ended:
            homes.setdefault(line.attribute("channel_id"), set()).add(program.home(line.computation))
    on_channel: dict[str, set[tuple[str, str]]] = {}
    for line in lines:
        on_channel.setdefault(line.attribute("channel_id"), set()).add((line.opcode.removesuffix("-start"), line.op_name))
    found: dict[str, Collective] = {}
    for line in lines:
        kind = line.opcode.removesuffix("-start")
        key = line.attribute("channel_id") or line.name
        if len(on_channel[line.attribute("channel_id")]) > 1:  # as those of every shard_map, which share one channel
            key = f"{key} {line.op_name} {line.result if line.computation in asynchronous else line.name}"
        if line.computation.startswith("all-reduce-scatter"):  # a fusion of it with the cut of each device's part
            kind, key = "reduce-scatter", f"{key} {line.name}"
        # Passes of a loop that are taken out of it, and copies of its body, keep the channel: each is a collective of its own.
        home = program.home(line.computation)
        if home not in homes.get(line.attribute("channel_id"), {home}):
            continue
        key = f"{key} in {home}"
        overlapped = line.opcode.endswith("-start") or line.computation in asynchronous
        if key in found and not (overlapped and not found[key].overlapped):
            continue  # the same collective, in the pieces into which a schedule cuts it
        sizes = array_bytes(line.result)
        group = _group_size(line.text, devices)
        # What is sent stands beside what is received in the result of these two.
        size = max(sizes) if line.opcode in ("all-gather-start", "collective-permute-start") else sum(sizes)
        whole = size * group if line.opcode == "reduce-scatter" else size
        share = (group - 1) / group
        moved = {"all-reduce": 2 * whole * share, "collective-permute": size}.get(kind, whole * share)
        largest = max(sizes) * (group if line.opcode == "reduce-scatter" else 1)
        numbers = max(array_elements(line.result)) * (group if line.opcode == "reduce-scatter" else 1)
        place = sizes.index(max(sizes))
        found[key] = Collective(
            kind, moved, times[line.computation], overlapped, group, largest, numbers, line.op_name, array_dtypes(line.result)[place],
            array_shapes(line.result)[place],
        )  # fmt: skip
    return sorted(found.values(), key=lambda one: -one.total)


def _group_size(text: str, devices: int) -> int:
    """Returns how many devices take part in a collective together."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        size = 1
        for axis in re.findall(r"'(\w+)'", found[2]):
            size *= int(sizes[axis])
        return size
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    return devices
