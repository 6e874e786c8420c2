"""Flags of XLA for tests, here and in the processes that they start."""

import os
import sys

# Most of the time of a test is its compilation, most of which is LLVM's optimisation: without it the same programs are
# compiled in less than half the time. With --slow all is as users have it. Processes of pytest-xdist find the choice made.
OPTIMISED = os.environ.setdefault("SFT_JAX_TEST_OPTIMISED", str(int("--slow" in sys.argv))) == "1"


def xla_flags(devices: int = 1) -> str:
    """Returns XLA_FLAGS for so many devices on the CPU."""
    quick = "" if OPTIMISED else " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return f"--xla_force_host_platform_device_count={devices}{quick}"
