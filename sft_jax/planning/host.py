"""What the CPU of this host can do, measured: nobody publishes it for all of them."""

import functools
import time
from pathlib import Path

import numpy as np
import psutil

# Bytes that a run takes beside its arrays: Python and what is imported, 0.5e9, and the compiler while the step is compiled.
# Measured with the quickstart's model and empty caches; scripts/check_cpu_peaks.py compares larger ones.
PROCESS = 1.0e9
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SIDE = 1536
_TRIES = 3


def host_memory() -> float:
    """Returns the bytes of memory that processes here may use: the host's, or those of the container."""
    limits = [int(text) for path in map(Path, _LIMITS) if path.is_file() and (text := path.read_text().strip()).isdecimal()]
    return float(min([psutil.virtual_memory().total, *limits]))


@functools.cache
def matmul_rate() -> float:
    """Returns the FLOP/s of a large product of float32 matrices by XLA: the peak that MFU is a share of."""
    import jax

    device = jax.devices("cpu")[0]
    with jax.default_device(device):
        matrix = jax.numpy.ones((_SIDE, _SIDE), "float32")
        product = jax.jit(lambda x: jax.numpy.dot(x, x, precision="highest"))
        seconds = _fastest(lambda: product(matrix).block_until_ready())
    return 2 * _SIDE**3 / seconds


@functools.cache
def copy_rate() -> float:
    """Returns the bytes/s that are read and written together when an array is copied."""
    numbers = np.ones(2**25, np.float32)
    copy = np.empty_like(numbers)
    return 2 * numbers.nbytes / _fastest(lambda: np.copyto(copy, numbers))


def _fastest(run) -> float:
    """Returns the seconds of the fastest of several runs, after one that is not counted."""
    run()
    seconds = []
    for _ in range(_TRIES):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
