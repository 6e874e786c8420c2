"""Large memory pages for a run on a CPU.

XLA takes the temporaries of every step from the system and gives them back. In pages of 4 KiB the kernel clears and maps
all of them anew each time: 150,000 page faults, a fifth of the step, for a model of 24M parameters and rows of 4 x 512.
glibc asks the kernel for large pages where a tunable says so, which it reads only when a process starts.
"""

import glob
import os
import sys
from pathlib import Path

_VARIABLE, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_SINCE = (2, 35)  # the version of glibc that has it
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def use_large_pages() -> None:
    """Starts this command once more with large pages, where it runs on a CPU and they are to be had by asking.

    Must be called before anything was done, since the process begins anew (with the same process id). Does nothing
    where GLIBC_TUNABLES is set, where there is an accelerator, and where the kernel gives large pages unasked or never.
    """
    if _VARIABLE not in os.environ and _on_cpu() and _on_request():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _VARIABLE: _SETTING})


def _on_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or not platforms and not any(map(glob.glob, _ACCELERATORS))


def _on_request() -> bool:
    """Whether large pages are given to those who ask, and glibc can."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return name == "glibc" and tuple(map(int, version.split("."))) >= _SINCE and "[madvise]" in _KERNEL.read_text()
    except (ValueError, OSError, AttributeError):  # another C library, or a kernel that says nothing of it
        return False
