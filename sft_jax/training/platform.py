"""What must be set before the first array is made: processes, compilation cache, memory of GPUs, deterministic kernels."""

import math
import os
import re
import socket
import sys
import time

import jax
from jax._src import xla_bridge  # has no public equivalent of backends_are_initialized

from sft_jax.data.cache import default_cache
from sft_jax.errors import Unreachable, UserError
from sft_jax.training.clusters import Place, find_place, unused_tasks
from sft_jax.training.coordination import exchange
from sft_jax.training.hardware import GPU_MEMORY_FRACTION
from sft_jax.training.local_devices import describe_host, own_gpus, uses_gpus

_START_VARIABLE = "SFT_JAX_START_SECONDS"  # within which all processes of a run must have started
_START_SECONDS = 300.0
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_FRACTION, _OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # JAX refuses both together
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_POLICY = "--xla_gpu_memory_fraction_policy"  # a flag of XLA that JAX lets decide in place of the fraction


def join_processes(heartbeat_seconds: float) -> None:
    """Makes this process one of a run with several, where the environment says so; else does nothing.

    See `find_place` for what says so. Where processes share a host with GPUs, each gets its share of them.

    Args:
        heartbeat_seconds: after so long without a sign of life a process counts as dead.

    Raises UserError where the environment says it in part only, Unreachable where the processes do not find each other.
    """
    if jax.distributed.is_initialized():
        return
    place = find_place(os.environ)
    if place is None:
        tasks = unused_tasks(os.environ)
        if tasks:
            print(f"This process is alone in a Slurm allocation of {tasks} tasks; start it with srun to use all of them.", file=sys.stderr)
        return
    if place.address is None:
        _initialize(place, heartbeat_seconds, _start_seconds())
        return
    seconds = _start_seconds()
    if place.index > 0:
        _wait_for(place, seconds)
    _initialize(
        place, heartbeat_seconds, seconds, coordinator_address=place.address, num_processes=place.count, process_id=place.index,
        cluster_detection_method="deactivate",
    )  # fmt: skip
    if uses_gpus() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        gpus = own_gpus(exchange(describe_host(os.environ)), place.index)
        if gpus is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, gpus)))


def _start_seconds() -> float:
    text = os.environ.get(_START_VARIABLE, "")
    try:
        seconds = float(text or _START_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UserError(f"{_START_VARIABLE}: must be a number of seconds above 0, not {text!r}.")
    return seconds


def _wait_for(place: Place, seconds: float) -> None:
    """Waits until the first process listens. JAX would wait as long, and then abort without a message."""
    host, _, port = place.address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Unreachable(
                    f"{place.launcher}: the first process of the run cannot be reached at {place.address} within {seconds:g} s ({error}). "
                    "Start process 0 there, and make sure that this machine can connect to the port (JAX_COORDINATOR_PORT chooses another); "
                    f"{_START_VARIABLE} is how long to wait."
                ) from error
            time.sleep(0.5)


def _initialize(place: Place, heartbeat_seconds: float, seconds: float, **arguments) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the only one on CPU that crosses processes
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from StopSignal
    try:
        # JAX aborts a process whose peers are gone, which `Peers` does sooner and with a message: after the time, up to two
        # beats until it is seen, and two in which the others read it. A busy machine is given 30 s on top.
        jax.distributed.initialize(
            **arguments, initialization_timeout=math.ceil(seconds), heartbeat_timeout_seconds=math.ceil(2 * heartbeat_seconds) + 30
        )
    except (RuntimeError, ValueError, OSError) as error:  # JaxRuntimeError is a RuntimeError
        reason = " ".join(str(error).split())[:300]
        raise Unreachable(
            f"{place.launcher}: the processes of the run did not find each other within {seconds:g} s ({reason}). Start all of them, with "
            f"the same address and number of processes, and make sure that the first one's port can be reached; {_START_VARIABLE} is how long to wait."
        ) from error


def set_up_platform(deterministic: bool) -> None:
    """Turns on the persistent compilation cache where it can be, and deterministic GPU kernels where asked; takes memory of GPUs.

    Every command that runs a model calls it before JAX looks for devices. A cache folder that the user chose
    (JAX_COMPILATION_CACHE_DIR or jax.config) is left as it is. Several CPU devices of one process have no cache, whoever chose it.
    """
    if several_cpu_devices():
        # A program that was read from the cache can wait for ever, or abort, in its collectives (seen with jax 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(default_cache() / "compiled"))
        # Small programs too: a start makes thirty of them, which take seconds to compile and a megabyte to keep.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _take_gpu_memory()
    if deterministic and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
            raise UserError(
                "train.deterministic: must be set before JAX has been used in this process; "
                f"start Python with XLA_FLAGS='{_DETERMINISTIC}', or call fit first."
            )
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()


def _take_gpu_memory() -> None:
    """Sets the share of a GPU's memory that JAX takes at its start, by default three quarters, to what plans count with.

    Does nothing where the user has chosen a share or how memory is taken.
    """
    chosen = os.environ.get(_FRACTION) or os.environ.get(_OLD_FRACTION) or _POLICY in os.environ.get("XLA_FLAGS", "")
    grows = os.environ.get(_PREALLOCATE) in ("false", "False", "0")  # as JAX reads it
    if uses_gpus() and not chosen and not grows:
        os.environ[_FRACTION] = str(GPU_MEMORY_FRACTION)


def several_cpu_devices() -> bool:
    """Whether this process will compute on more than one CPU device; asks no device, which would come too early."""
    if not (jax.config.jax_platforms or "cpu").startswith("cpu"):
        return False
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))  # the last one counts
    number = jax.config.jax_num_cpu_devices
    return (number if number > 0 else int(asked[-1]) if asked else 1) > 1
