"""A worker process: sets itself limits, then answers requests until the pipe closes.

Rows and chat templates come from outside and may loop for ever or eat memory, so they are only ever touched here; the
parent (sft_jax.data.stores.workers) kills a worker that takes too long. Imports stay light: a worker starts in a fraction of
a second and never loads jax or transformers.
"""

import ctypes
import gc
import importlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from sft_jax.errors import UserError

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h: the signal that the kernel sends when the parent dies
MEMORY_EXIT = 77  # exit status of a worker that found itself above its memory limit


def main(handle: int, parent: int) -> None:
    """Serves requests on the pipe `handle` for the process `parent`.

    The first message is (target, setup, memory_mb): `target` is "module:callable", and callable(setup) gives the
    function that is then called with every request. Answers are ("ready", None), ("result", value), ("memory", None),
    ("refused", message of a UserError) or ("error", text).
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # both go to the whole job; the parent decides when to end
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(handle)
    try:
        target, setup, memory_mb = connection.recv()
        module, name = target.split(":")
        function = getattr(importlib.import_module(module), name)(setup)
    except EOFError:
        return
    except Exception:
        connection.send(("error", traceback.format_exc()))
        return
    gc.freeze()  # what was imported stays, and looking at it time and again costs more than it finds
    _limit(memory_mb, parent)
    connection.send(("ready", None))
    try:
        _serve(connection, function)
    except MemoryError:  # a request too large to be received, or an answer too large to be sent
        os._exit(MEMORY_EXIT)


def _serve(connection: Connection, function: Callable) -> None:
    """Answers requests until the pipe closes."""
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", function(request))
        except MemoryError:
            answer = ("memory", None)
        except UserError as error:
            answer = ("refused", str(error))
        except Exception as error:  # whatever a row can cause; the parent finds out which row and names it
            answer = ("error", _one_line(error))
        connection.send(answer)


def _limit(memory_mb: int, parent: int) -> None:
    """Limits memory to `memory_mb` beyond what is in use now, and ends the process when the parent is gone."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # also where one long call into C keeps the watch below from running
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    extra = memory_mb << 20
    size = _address_space()
    if size:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = size + extra if hard == resource.RLIM_INFINITY else min(size + extra, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    threading.Thread(target=_watch, args=(_peak_memory() + extra, parent), daemon=True).start()


def _watch(peak: int, parent: int) -> None:
    """Ends the process when it is an orphan, or above its memory where the system does not limit the address space."""
    while True:
        if os.getppid() != parent:
            os._exit(1)
        if _peak_memory() > peak:
            os._exit(MEMORY_EXIT)
        time.sleep(0.1)


def _address_space() -> int:
    """Returns the bytes of address space in use; 0 where the system does not tell (anything but Linux)."""
    if not os.path.exists("/proc/self/statm"):
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _one_line(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({os.path.basename(last.filename)}:{last.lineno})"
