"""A bar for what takes long, on a terminal; nothing elsewhere. On standard error, since commands answer on standard output."""

import sys

import rich.console
import rich.progress


class Bar:
    """Counts what is done of `total`, as a context manager whose value is what is called with how much more is done."""

    def __init__(self, what: str, total: int):
        self._total, self._bar = total, None
        console = rich.console.Console(file=sys.stderr, soft_wrap=True, highlight=False)
        if console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeRemainingColumn(),
                console=console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "Bar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __call__(self, more: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=more)

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()
