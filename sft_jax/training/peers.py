"""Whether the other processes of a run still live, so that none waits for ever for one that does not.

Collectives on TPU and GPU wait without end for a process that has died. So a thread of each process writes a sign of life into
the coordination service every few seconds; the first process reads them and writes down which one is lost; every process that
reads this ends with one message. That takes at most `heartbeat_seconds` and two beats where a process was killed or its host is
gone, two beats where it could still say that it failed. The first process is watched by all others. (JAX has heartbeats too,
but aborts without saying what to do; it is given more than twice the time, and ends processes in which Python cannot run any more.)

If the first process itself dies, JAX aborts the others at once; `_on_abort` turns that into a message and exit code 1.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed  # coordinator_address and process_id, without making devices, have no public equivalent

from sft_jax.errors import StoppedBySignal, UserError, reason_of
from sft_jax.training.coordination import client

EXIT_LOST = 1
_KEYS = "sft_jax/peers/"
_FIRST = f"{_KEYS}0"
_VERDICT = "sft_jax/lost"
_ENDED, _FAILED = "has ended", "failed"
_BEAT = 3.0  # seconds, or a quarter of heartbeat_seconds where that is less
_AGAIN = "Start the same command again in all processes: it continues from the newest checkpoint."


class Peers:
    """Watches the other processes while it is entered; does nothing in a run of one process.

    An unexpected error is printed and ends the process here, since a process that waits at its end for the others would keep
    them waiting too.
    """

    def __init__(self, heartbeat_seconds: float):
        self._limit = heartbeat_seconds
        self._beat = min(_BEAT, heartbeat_seconds / 4)
        self._service, self._index = client(), distributed.global_state.process_id
        self._state = ""  # why this process has ended, once it has
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self) -> "Peers":
        if self._service is not None:
            self._say()
            if self._index > 0:
                _handle_abort(self._on_abort)
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._service is None:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            # What a collective raises when a peer is gone; the thread ends this process once it is known which.
            wait = self._limit + 3 * self._beat
            told = f"A computation failed ({reason_of(error)[:200]}); waiting up to {wait:.0f} s for what other processes say."
            print(told, file=sys.stderr, flush=True)
            time.sleep(wait)
        expected = error is None or isinstance(error, (StoppedBySignal, UserError))  # others that meet it too end by themselves
        why = f" ({kind.__name__}: {reason_of(error)})" if error is not None else ""
        self._state = f"{_ENDED if expected else _FAILED}{why}"
        with contextlib.suppress(RuntimeError):  # the service may be what is gone
            self._say()
        if not expected:
            traceback.print_exception(error)
            sys.stderr.flush()
            time.sleep(3 * self._beat)  # the first process is the service, in which the others read why
            os._exit(EXIT_LOST)
        self._over.set()
        self._thread.join()
        if self._index > 0:
            _handle_abort(None)

    def _say(self) -> None:
        self._count += 1
        value = {"count": self._count, "state": self._state, "pid": os.getpid(), "host": socket.gethostname()}
        self._service.key_value_set(f"{_KEYS}{self._index}", json.dumps(value), allow_overwrite=True)

    def _watch(self) -> None:
        judge = Judge(self._limit)
        while not self._over.wait(self._beat):
            lost = None
            with contextlib.suppress(RuntimeError):  # the service is gone, which JAX itself acts on
                self._say()
                if self._index == 0:
                    signs = dict(self._service.key_value_dir_get(_KEYS))
                else:
                    signs = {_FIRST: self._service.key_value_try_get(_FIRST)}
                lost = judge.lost(signs, time.monotonic())
                if lost is not None and self._index == 0:
                    self._service.key_value_set(_VERDICT, lost, allow_overwrite=True)
                    time.sleep(2 * self._beat)  # in which the others read it, since the service ends with this process
            with contextlib.suppress(RuntimeError):  # there is no verdict
                lost = self._service.key_value_try_get(_VERDICT)
            if lost is not None and not self._state:
                _end(lost)

    def _on_abort(self) -> None:
        """Ends this process if it is aborted because the first process is gone; else returns."""
        host, _, port = distributed.global_state.coordinator_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            _end(f"Process 0 of the run, through which all find each other, cannot be reached ({error}); its output says why.")


class Judge:
    """Finds the process that is lost, by the clock of this process alone."""

    def __init__(self, limit: float):
        self._limit = limit
        self._seen: dict[str, tuple[int, float]] = {}  # process -> its last count, and when it was new

    def lost(self, signs: dict[str, str], now: float) -> str | None:
        """Returns what is to be said of the first process that is lost, or None while all live.

        Args:
            signs: what processes have written, by key.
            now: seconds.
        """
        for key in sorted(signs, key=lambda key: int(key.rpartition("/")[2])):
            sign = json.loads(signs[key])
            name = f"Process {key.rpartition('/')[2]} of the run (pid {sign['pid']} on {sign['host']})"
            if sign["state"].startswith(_FAILED):
                return f"{name} {sign['state']}; its output says more."
            count, since = self._seen.get(key, (None, now))
            if count != sign["count"]:
                self._seen[key] = (sign["count"], now)
            elif now - since > self._limit and sign["state"]:
                return f"{name} {sign['state']}, and this one waits for it."
            elif now - since > self._limit:
                return (
                    f"{name} has given no sign of life for {self._limit:g} s (train.heartbeat_seconds): it was killed, its host "
                    "is gone, or it cannot run."
                )
        return None


def _end(reason: str) -> None:
    print(f"error: {reason} {_AGAIN}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_kept: list = []  # what the C library calls must not be collected


def _handle_abort(action) -> None:
    """Has `action` called when the C++ runtime aborts this process, which Python's own signal handlers never see; None undoes it.

    The process is aborted all the same if the action returns.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    if action is None:
        library.signal(signal.SIGABRT, None)  # SIG_DFL
        return
    handler = _Handler(lambda number: action())
    _kept.append(handler)
    library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
