"""What a command shows while it reads a model: a bar on a terminal, one line elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import rich.console
import rich.progress

Loading = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]  # of the model that is named: LoadProgress, or `silently`


def silently(name: str) -> AbstractContextManager[None]:
    """Shows nothing."""
    del name
    return contextlib.nullcontext()


class LoadProgress:
    """Shows the bytes that have been read, as a context manager whose value is what `load` calls with them.

    Written to standard error, since commands answer on standard output. Only the first process shows anything.
    """

    def __init__(self, name: str, shown: bool = True):
        self._name = name
        self._shown = shown
        self._done = self._total = 0
        self._bar = None
        console = rich.console.Console(file=sys.stderr, soft_wrap=True, highlight=False)
        if shown and console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("reading {task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.DownloadColumn(),
                rich.progress.TransferSpeedColumn(),
                rich.progress.TimeRemainingColumn(),
                console=console, transient=True,
            )  # fmt: skip

    def __enter__(self) -> "LoadProgress":
        self._started = time.perf_counter()
        return self

    def __call__(self, done: int, total: int) -> None:
        """Takes note of `done` bytes of `total`. Nothing is shown before the first call, so not where nothing is read."""
        if self._bar is not None:
            if not self._total:
                self._task = self._bar.add_task(self._name)
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
        self._done, self._total = done, total

    def __exit__(self, *error) -> None:
        if self._bar is not None and self._total:
            self._bar.stop()
        if self._shown and self._total and self._done == self._total:
            seconds = time.perf_counter() - self._started
            print(f"Read {self._total / 1e9:.2f} GB of {self._name} in {seconds:.1f} s.", file=sys.stderr, flush=True)
