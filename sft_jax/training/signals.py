"""Stopping on a signal: SIGTERM (preemption, schedulers) and Ctrl-C ask the run to save and end; they never cut it."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Notes SIGTERM and SIGINT while it is entered. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.name: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def requested(self, step: int) -> bool:
        """Returns whether to stop before the next step; with several processes, in all of them at the same step."""
        if jax.process_count() == 1:
            return self.name is not None
        return multihost_utils.reached_preemption_sync_point(step)
