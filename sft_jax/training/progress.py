"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere; and where its time went."""

import sys
import time

import psutil
import rich.console
import rich.progress


class Progress:
    """Shows the steps, as a context manager: the terminal is left as it was, however the run ends.

    Only the first process shows anything.
    """

    def __init__(self, total_steps: int, first_step: int, shown: bool = True):
        self._total = total_steps
        self._shown = shown
        self._bar = None
        self._console = rich.console.Console(file=sys.stdout, soft_wrap=True, highlight=False)
        if shown and self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[status]}"),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, step: int, record: dict[str, float | None]) -> None:
        """Shows the record of a window: rates and what is left only where a step of it was timed."""
        if not self._shown:
            return
        shown = (("epoch", "epoch", ".2f"), ("loss", "loss", ".4f"), ("lr", "learning_rate", ".2e"), ("grad", "grad_norm", ".2f"))
        parts = [f"{label} {record[name]:{form}}" for label, name, form in shown if record[name] is not None]
        parts += [f"{name} {record[f'{name}_steps']:.0f}" for name in ("nonfinite", "empty") if f"{name}_steps" in record]
        timed = "seconds_per_step" in record
        if timed:
            real, supervised = record["real_tokens_per_second"], record["supervised_tokens_per_second"]
            parts.append(f"{real:,.0f} real and {supervised:,.0f} supervised tokens/s")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status="  ".join(parts))
            return
        if timed:
            parts.append(f"{duration((self._total - step) * record['seconds_per_step'])} left")
        self._print("  ".join([f"step {step}/{self._total}", *parts]))

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            self._print(text)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            print(text, flush=True)


class Phases:
    """Seconds by phase, which add up to the life of the process.

    A phase inside another is left out of that one's time. "start" is what came before the run, "other" what is in no
    phase.
    """

    def __init__(self):
        self._seconds = {"start": time.time() - psutil.Process().create_time()}
        self._open = ["other"]
        self._since = time.perf_counter()

    def __call__(self, name: str) -> "_Phase":
        return _Phase(self, name)

    @property
    def seconds(self) -> dict[str, float]:
        self._switch()
        return dict(self._seconds)

    def enter(self, name: str) -> None:
        self._switch()
        self._open.append(name)

    def leave(self) -> None:
        self._switch()
        self._open.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class _Phase:
    def __init__(self, phases: Phases, name: str):
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._phases.enter(self._name)

    def __exit__(self, *error) -> None:
        self._phases.leave()


def duration(seconds: float) -> str:
    """Returns a time as "1h05m" or "1m05s"."""
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
