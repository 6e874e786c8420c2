"""What must be set before the first array is made: processes, compilation cache, deterministic kernels."""

import glob
import importlib.util
import os
import socket
import time

import jax
from jax._src import xla_bridge  # has no public equivalent of backends_are_initialized

from sft_jax.data.cache import default_cache
from sft_jax.errors import UserError

_START_SECONDS = 300.0  # within which all processes of a run must have started
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def join_processes() -> None:
    """Makes this process one of a run with several, where the environment says so; else does nothing.

    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID name the run. In a
    Slurm step of several tasks (srun) and on a Cloud TPU the processes find each other, and no variable is needed.
    """
    if jax.distributed.is_initialized():
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        numbers = {}
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            value = os.environ.get(name, "")
            if not value.isdigit():
                raise UserError(f"{name}: must be a number where JAX_COORDINATOR_ADDRESS is set, not '{value}'.")
            numbers[name] = int(value)
        if numbers["JAX_PROCESS_ID"] > 0:
            _wait_for(address)
        _initialize(f"JAX_COORDINATOR_ADDRESS={address}", address, numbers["JAX_NUM_PROCESSES"], numbers["JAX_PROCESS_ID"])
    elif _in_slurm_step():
        _initialize(f"the Slurm step {os.environ['SLURM_JOB_ID']}")
    elif _on_cloud_tpu():
        _initialize("the TPU slice")


def _wait_for(address: str) -> None:
    """Waits until the first process listens at `address`. JAX would wait as long, and then abort without a message."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS: must be host:port of the first process, not '{address}'.")
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS={address}: the first process of the run cannot be reached ({error}). Start it "
                    "there, with JAX_PROCESS_ID=0, and make sure that this machine can connect to the port."
                ) from error
            time.sleep(0.5)


def _initialize(run: str, *arguments) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the only one on CPU that crosses processes
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from StopSignal
    try:
        jax.distributed.initialize(*arguments)
    except (RuntimeError, ValueError, OSError) as error:  # JaxRuntimeError is a RuntimeError
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{run}: the processes of the run did not find each other ({reason}). Start all of them, with the same address "
            "and number of processes, and make sure that the first one's port can be reached."
        ) from error


def _in_slurm_step() -> bool:
    """Whether srun has started this process as one of several; inside an allocation alone there is only one."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX reads
    tasks = os.environ.get("SLURM_NTASKS", "")
    return tasks.isdigit() and int(tasks) > 1 and all(name in os.environ for name in names)


def _on_cloud_tpu() -> bool:
    """Whether this is a TPU machine that JAX will use: it has the library and the devices, and no other platform is asked for."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in platforms and importlib.util.find_spec("libtpu") is not None and bool(devices)


def set_up_platform(deterministic: bool) -> None:
    """Turns on the persistent compilation cache, and deterministic GPU kernels where asked.

    A cache folder that the user chose (JAX_COMPILATION_CACHE_DIR or jax.config) is left as it is.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(default_cache() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if deterministic and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
            raise UserError(
                "train.deterministic: must be set before JAX has been used in this process; "
                f"start Python with XLA_FLAGS='{_DETERMINISTIC}', or call fit first."
            )
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
