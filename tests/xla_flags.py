"""Flags of XLA for tests, here and in the processes that they start."""

import os
import sys
from importlib.metadata import version

# Most of the time of a test is its compilation, most of which is LLVM's optimisation and the code of fusions: without them the same
# programs are compiled in a third of the time. With --slow all is as users have it. Processes of pytest-xdist find the choice made.
OPTIMISED = os.environ.setdefault("SFT_JAX_TEST_OPTIMISED", str(int("--slow" in sys.argv))) == "1"
_QUICK = (
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # two processes of pytest-xdist have the two cores
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),  # XLA aborts at a flag that is gone
)  # fmt: skip


def xla_flags(devices: int = 1) -> str:
    """Returns XLA_FLAGS for so many devices on the CPU."""
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *(() if OPTIMISED else _QUICK)))
