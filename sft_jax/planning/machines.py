"""Machines by name: chips, how they are connected, and what a chip can do.

Sources of the numbers: for TPUs the pages of each generation in the documentation of Google Cloud, and for the bandwidth of
one link and of PCIe the tables of "How to Scale Your Model" (jax-ml.github.io/scaling-book, part 2); what a program may use of the memory
is what the compiler says. For GPUs the vendor's data sheets, without sparsity; for the network of a node those of DGX A100 (eight cards of
200 Gb/s) and DGX H100, H200 and B200 (eight of 400 Gb/s, 400 GB/s together). L4, L40S and GeForce cards have no NVLink: their link is
PCIe 4.0 x16, and a node has the network of the largest one that is rented, Google's g2 (L4, 100 Gb/s) and AWS's g6e (L40S, 400 Gb/s).
For GeForce cards, which have none, that of g2 is taken; their peaks are those with sums in float32, from the white paper on the Ada
architecture. For the CPU it is measured, see `sft_jax.planning.host`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass

from sft_jax.errors import UserError, did_you_mean
from sft_jax.planning.host import PROCESS, copy_rate, host_memory, matmul_rate
from sft_jax.training.hardware import GPU_MEMORY_FRACTION

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip; every chip is one JAX device."""

    platform: str  # "tpu", "gpu" or "cpu"
    label: str
    memory: float  # bytes that a program can use
    flops: float  # dense bf16 peak, FLOP/s
    bandwidth: float  # of memory, bytes/s
    link: float  # bytes/s, one way: of a TPU's link to one neighbour, of all a GPU's links inside its node
    outside: float  # bytes/s, one way: a chip's share of the network cards of its node or host
    host: float  # bytes/s, one way: of a chip's PCIe link to the memory of its host, which model.remat=offload uses
    process: float = 0.0  # bytes of this memory that a run takes for itself, beside its arrays


CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", "TPU v4", 30.75 * GIB, 275e12, 1.228e12, 45e9, 6.25e9, 16e9),
    "v5e": Chip("tpu", "TPU v5e", 15.75 * GIB, 197e12, 0.819e12, 45e9, 3.1e9, 16e9),
    "v5p": Chip("tpu", "TPU v5p", 95.74 * GIB, 459e12, 2.765e12, 90e9, 6.25e9, 16e9),
    "v6e": Chip("tpu", "TPU v6e", 31.25 * GIB, 918e12, 1.638e12, 90e9, 12.5e9, 32e9),
    "a100": Chip("gpu", "NVIDIA A100 80GB", GPU_MEMORY_FRACTION * 80e9, 312e12, 2.039e12, 300e9, 25e9, 32e9),
    "a100-40": Chip("gpu", "NVIDIA A100 40GB", GPU_MEMORY_FRACTION * 40e9, 312e12, 1.555e12, 300e9, 25e9, 32e9),
    "h100": Chip("gpu", "NVIDIA H100 SXM", GPU_MEMORY_FRACTION * 80e9, 989e12, 3.35e12, 450e9, 50e9, 63e9),
    "h200": Chip("gpu", "NVIDIA H200", GPU_MEMORY_FRACTION * 141e9, 989e12, 4.8e12, 450e9, 50e9, 63e9),
    "b200": Chip("gpu", "NVIDIA B200", GPU_MEMORY_FRACTION * 180e9, 2250e12, 8.0e12, 900e9, 50e9, 63e9),
    "l4": Chip("gpu", "NVIDIA L4", GPU_MEMORY_FRACTION * 24e9, 121e12, 0.3e12, 32e9, 1.56e9, 32e9),
    "l40s": Chip("gpu", "NVIDIA L40S", GPU_MEMORY_FRACTION * 48e9, 362e12, 0.864e12, 32e9, 6.25e9, 32e9),
    "rtx4080": Chip("gpu", "NVIDIA GeForce RTX 4080", GPU_MEMORY_FRACTION * 16e9, 97.5e12, 0.717e12, 32e9, 1.56e9, 32e9),
    "rtx4090": Chip("gpu", "NVIDIA GeForce RTX 4090", GPU_MEMORY_FRACTION * 24e9, 165.2e12, 1.008e12, 32e9, 1.56e9, 32e9),
}
IN_CORES = ("v4", "v5p")  # slices of these are named by TensorCores, of which a chip has two; the others by chips
_NODE = 8  # GPUs that are connected directly
_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # that are tried
# Chips along each axis of the slices that can be rented, by their number.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8),
    1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16),
}  # fmt: skip
SHAPES = {"v4": _CUBES, "v5p": _CUBES, "v5e": _FLAT, "v6e": _FLAT}


@dataclass(frozen=True)
class Machine:
    """One or several slices of TPUs or nodes of GPUs, or the CPU of a host."""

    name: str  # as users write it
    kind: str  # a key of CHIPS, or "cpu"
    shape: tuple[int, ...]  # chips along each axis of a TPU slice; (count,) of others
    measured: Chip | None = None  # of a CPU
    slices: int = 1  # of TPUs

    @property
    def chip(self) -> Chip:
        return self.measured or CHIPS[self.kind]

    @property
    def devices(self) -> int:
        """JAX devices, which are chips: the two cores of a v4 or v5p chip work as one."""
        return self.slices * math.prod(self.shape)

    @property
    def topology(self) -> str:
        """The name by which libtpu knows each slice, such as "v5p:2x2x2"."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def nodes(self) -> int:
        """Groups of devices that only a network joins: slices of TPUs, whatever hosts they have, and nodes of GPUs."""
        return max(self.devices // _NODE, 1) if self.chip.platform == "gpu" else self.slices

    @property
    def name_of_nodes(self) -> str:
        return "slices" if self.chip.platform == "tpu" else "nodes"

    @property
    def collective_bandwidth(self) -> float:
        """Bytes/s that reach a device over links, when all of a slice or a node gather from all.

        Of a TPU over all axes of the slice at once, both ways around where an axis is a ring: v5e and v6e at 16 chips, v4
        and v5p at multiples of 4.
        """
        if self.chip.platform != "tpu":
            return self.chip.link
        ring = 4 if self.kind in IN_CORES else 16
        return self.chip.link * max(1, sum((2 if size % ring == 0 else 1) for size in self.shape if size > 1))

    def describe(self) -> str:
        """Returns a line such as "v5p-16: 8 chips (16 TensorCores, 2x2x2), 8 devices of 95.7 GiB"."""
        each = self.devices // self.slices
        chips = f"{self.slices} slices of " * (self.slices > 1) + f"{each} chip{'s' if each > 1 else ''}"
        if self.chip.platform == "cpu":
            return f"{self.name}: one device of {self.chip.memory / GIB:.1f} GiB, as fast as the CPU here ({self.chip.flops / 1e9:,.0f} GFLOP/s)"
        if self.chip.platform == "gpu":
            return f"{self.name}: {self.devices} x {self.chip.label}, {self.chip.memory / GIB:.1f} GiB of each used"
        cores = f"{2 * each} TensorCores, " if self.kind in IN_CORES else ""
        return (
            f"{self.name}: {chips} of {self.chip.label} ({cores}{'x'.join(map(str, self.shape))}), which JAX sees as {self.devices} "
            f"device{'s' if self.devices > 1 else ''} of {self.chip.memory / GIB:.2f} GiB"
        )


def machine(name: str, memory_gib: float | None = None) -> Machine:
    """Returns the machine of a name: v5e-16 (chips), v5p-64 (TensorCores), v5p:2x2x4 (chips), 2xv5p-64 (slices), h100x8 (GPUs), or cpu.

    Args:
        memory_gib: Of the CPU; None: what this host has.

    Raises UserError naming the nearest one that is known.
    """
    text = name.strip().lower().replace("v5litepod", "v5e")
    if text == "cpu":
        return cpu(memory_gib)
    if memory_gib is not None:
        raise UserError(f"--memory-gib: is of a CPU; leave it out with --topology {name}, whose memory is known.")
    if found := re.fullmatch(r"([1-9]\d*)x(v\d.*)", text):
        return dataclasses.replace(machine(found[2]), name=text, slices=int(found[1]))
    if found := re.fullmatch(r"(v\d+\w?)-(\d+)", text):
        kind, count = found[1], int(found[2])
        _check_kind(name, kind, "tpu")
        shapes, per_chip = SHAPES[kind], 2 if kind in IN_CORES else 1
        shape = shapes.get(count // per_chip) if count % per_chip == 0 else None
        if shape is None:
            sizes = ", ".join(f"{kind}-{chips * per_chip}" for chips in shapes)
            raise UserError(f"--topology: there is no slice {name}; there are {sizes}.")
        return Machine(text, kind, shape)
    if found := re.fullmatch(r"(v\d+\w?):(\d+(?:x\d+)+)", text):
        kind, shape = found[1], tuple(map(int, found[2].split("x")))
        _check_kind(name, kind, "tpu")
        axes = len(next(iter(SHAPES[kind].values())))
        if len(shape) != axes or 0 in shape:
            example = f"{kind}:{'x'.join('2' * axes)}"
            raise UserError(f"--topology: {name}: chips of {CHIPS[kind].label} are connected along {axes} axes, such as {example}.")
        return Machine(text, kind, shape)
    if found := re.fullmatch(r"([a-z]+\d+[a-z]?(?:-\d+)?)(?:x(\d+))?", text):
        kind, count = found[1], int(found[2] or 1)
        _check_kind(name, kind, "gpu")
        if count < 1 or (count > _NODE and count % _NODE):
            raise UserError(f"--topology: {name}: GPUs come in nodes of {_NODE}; name up to {_NODE} of them or a multiple.")
        return Machine(text, kind, (count,))
    raise UserError(
        f"--topology: {name!r} is no machine; write v5e-16 or v6e-8 (chips), v5p-16 (TensorCores, two a chip), v5p:2x2x2 (chips "
        "along each axis), 2xv5p-16 (slices), h100x8 (GPUs) or cpu."
    )


def larger(than: Machine) -> list[Machine]:
    """Returns the machines of a kind with more devices, smallest first."""
    if than.chip.platform == "tpu":
        per_name = 2 if than.kind in IN_CORES else 1
        return [machine(f"{than.kind}-{chips * per_name}") for chips in SHAPES[than.kind] if chips > than.devices]
    return [machine(f"{than.kind}x{count}") for count in _GPUS if count > than.devices]


def cpu(memory_gib: float | None = None) -> Machine:
    """Returns the CPU of this host, or one as fast with another memory."""
    if memory_gib is not None and not memory_gib > 0:
        raise UserError(f"--memory-gib: must be above 0, not {memory_gib:g}.")
    memory = host_memory() if memory_gib is None else memory_gib * GIB
    rate = copy_rate()
    return Machine("cpu", "cpu", (1,), Chip("cpu", "CPU", memory, matmul_rate(), rate, rate, rate, rate, PROCESS))


def _check_kind(name: str, kind: str, platform: str) -> None:
    known = [other for other, chip in CHIPS.items() if chip.platform == platform]
    if kind not in known:
        raise UserError(f"--topology: {name}: unknown chip '{kind}'; {did_you_mean(kind, known)}.")
