"""The least time that a step can take: what the slowest of arithmetic, memory and links needs (Williams et al. 2009)."""

from collections.abc import Sequence
from dataclasses import dataclass

from sft_jax.config import ModelConfig
from sft_jax.planning.collectives import Collective
from sft_jax.planning.machines import Machine

# Passes of the matrix unit for one product of float32 numbers, by model.matmul_precision; of bfloat16 it is one.
_PASSES = {"cpu": {"default": 1, "high": 1, "highest": 1}, "tpu": {"default": 1, "high": 3, "highest": 6}, "gpu": {"default": 2, "high": 6, "highest": 15}}


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step by what it waits for."""

    compute: float
    memory: float
    overlapped: float  # collectives that run beside computation
    exposed: float  # collectives that computation waits for
    host: float = 0.0  # what is offloaded to the memory of the host and read again, beside computation

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.overlapped, self.host) + self.exposed

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"arithmetic": self.compute, "memory": self.memory, "links": self.overlapped + self.exposed, "host": self.host}
        return max(parts, key=parts.__getitem__)


def roofline(
    machine: Machine, model: ModelConfig, flops: float, traffic: float, collectives: Sequence[Collective], offloaded: float = 0.0
) -> Roofline:
    """Returns the roofline of a step.

    Args:
        flops: Of all devices, computed twice where remat does.
        traffic: Bytes that each device reads from and writes to its memory.
        offloaded: Bytes that each device writes to the memory of its host, and reads again.
    """
    chip = machine.chip
    passes = _PASSES[chip.platform][model.matmul_precision] if model.compute_dtype == "float32" else 1
    overlapped = sum(_seconds(machine, one) for one in collectives if one.overlapped)
    exposed = sum(_seconds(machine, one) for one in collectives if not one.overlapped)
    return Roofline(
        flops * passes / machine.devices / chip.flops, traffic / chip.bandwidth, overlapped, exposed, 2 * offloaded / chip.host
    )  # fmt: skip


def _seconds(machine: Machine, one: Collective) -> float:
    """Returns the seconds of a collective in a step: those of links or network, since pieces go over both at the same time."""
    return one.times * max(one.inside / machine.collective_bandwidth, one.across / machine.chip.outside)
