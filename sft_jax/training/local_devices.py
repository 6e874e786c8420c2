"""Which GPUs of a host belong to this process, where several processes of a run share the host."""

import glob
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_jax.errors import UserError


def describe_host(environment: Mapping[str, str]) -> str:
    """Returns a text that is the same in processes that see the same GPUs of the same host, and in no other.

    Beside the visible GPUs it names those that the process may open. Where Slurm gives each task its own, by cgroups, both of two
    tasks with four GPUs see 0 to 3, which are not the same ones.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.is_file() else ""
    return "\n".join((socket.gethostname(), machine, " ".join(allowed_gpus()), *visible_gpus(environment)))


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the NVIDIA GPUs that this process may use, by number or name, without asking the driver."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return allowed_gpus()


def allowed_gpus() -> list[str]:
    """Returns the device files of NVIDIA GPUs that this process may open; the kernel counts what cgroups forbid."""
    paths = sorted(path for path in glob.glob("/dev/nvidia*") if re.fullmatch(r"/dev/nvidia\d+", path))
    return [path for path in paths if os.access(path, os.R_OK | os.W_OK)]


def own_gpus(hosts: Sequence[str], index: int) -> list[int] | None:
    """Returns the places, among the visible GPUs, of those that process `index` uses; None for all.

    A process that has a host for itself uses all. Processes that see the same GPUs share them evenly, in their order. Where
    there are fewer GPUs than processes, each process was already given its own (such as by Slurm's --gpus-per-task, whose
    processes all see a device 0).

    Args:
        hosts: `describe_host` of every process of the run.

    Raises UserError where the GPUs of a host cannot be shared evenly.
    """
    gpus = len(hosts[index].split("\n")) - 3
    sharing = [process for process, host in enumerate(hosts) if host == hosts[index]]
    if len(sharing) == 1 or gpus < len(sharing):
        return None
    if gpus % len(sharing):
        raise UserError(
            f"{len(sharing)} processes of the run share a host with {gpus} GPUs, which cannot be shared evenly. Start one "
            "process a host or one a GPU, or set JAX_LOCAL_DEVICE_IDS in each process to the numbers of its GPUs."
        )
    each = gpus // len(sharing)
    first = sharing.index(index) * each
    return list(range(first, first + each))


def uses_gpus() -> bool:
    """Whether JAX may use GPUs here at all."""
    return bool(set((os.environ.get("JAX_PLATFORMS") or "cuda").split(",")) & {"cuda", "gpu"})
