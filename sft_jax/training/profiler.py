"""A trace of some steps for TensorBoard's profiler, in WORKDIR/profile."""

from pathlib import Path

import jax

_SKIPPED = 2  # steps before the trace, which compile and fill caches


class Profiler:
    """Traces `count` of the next `steps` steps, as a context manager; the first two are left out where there are more.

    `folder` is None in every process but the first, which keeps time with it and writes nothing.
    """

    def __init__(self, folder: Path | None, count: int, steps: int):
        self._folder = folder
        self._first = max(0, min(_SKIPPED, steps - count))
        self._stop = self._first + count if count else None
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def begins(self, steps_done: int) -> bool:
        """Whether the next step is the first of the trace; the started ones should end before `start`."""
        return self._stop is not None and steps_done == self._first

    def ends(self, steps_done: int) -> bool:
        return steps_done == self._stop

    def start(self) -> None:
        if self._folder is not None:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
