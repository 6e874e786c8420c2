"""Metrics of a run: sums over a window of steps, a JSONL file, TensorBoard, and a line or bar of progress.

Means are made once, from sums: a window's loss is the total over its supervised tokens, never a mean of means.
"""

import sys
import time
from typing import Any

import rich.console
import rich.progress
from tensorboardX import SummaryWriter

from sft_jax.training.workdir import Workdir

METRICS_FILE = "metrics.jsonl"


class Window:
    """Sums of the step metrics since the last record, and the time they took; and of all steps of this process.

    The first step compiles: its loss counts, its time and its tokens are left out of the rates.
    """

    NAMES = ("loss_sum", "weight", "correct", "supervised_tokens", "real_tokens", "attention_pairs", "nonfinite", "empty")

    def __init__(self):
        self.totals = dict.fromkeys(self.NAMES, 0.0)  # of timed steps, for the rates of the summary
        self.timed_steps = 0
        self.timed_seconds = 0.0
        self.left_out = {"nonfinite": 0, "empty": 0}  # steps that left the state as it was
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._sums = dict.fromkeys(self.NAMES, 0.0)
        self._timed = dict.fromkeys(self.NAMES, 0.0)
        self._timed_steps = 0
        self._last: dict[str, float] = {}

    def add(self, metrics: dict[str, Any], timed: bool) -> None:
        """Adds the metrics of one step, already on the host. Time up to one that is not timed is left out."""
        for name in self.NAMES:
            self._sums[name] += float(metrics[name])
        for name in self.left_out:
            self.left_out[name] += int(metrics[name])
        self._last = {name: float(metrics[name]) for name in ("grad_norm", "learning_rate")}
        if not timed:
            self._start = time.perf_counter()
            return
        self._timed_steps += 1
        for name in self.NAMES:
            self._timed[name] += float(metrics[name])

    def pause(self, seconds: float) -> None:
        """Leaves time that was not training (evaluation, checkpoints) out of the rates."""
        self._start += seconds

    def take(self) -> dict[str, float]:
        """Returns the means and rates of the window and begins another."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        sums, timed = self._sums, self._timed
        record = {
            "loss": sums["loss_sum"] / sums["weight"] if sums["weight"] else 0.0,
            "accuracy": sums["correct"] / sums["weight"] if sums["weight"] else 0.0,
            **self._last,
            "real_tokens": sums["real_tokens"],
            "supervised_tokens": sums["supervised_tokens"],
            "real_tokens_per_second": timed["real_tokens"] / seconds,
            "supervised_tokens_per_second": timed["supervised_tokens"] / seconds,
            "seconds_per_step": seconds / max(self._timed_steps, 1),
        }
        for name in self.left_out:
            if sums[name]:
                record[f"{name}_steps"] = sums[name]
        for name in self.NAMES:
            self.totals[name] += timed[name]
        if self._timed_steps:
            self.timed_steps += self._timed_steps
            self.timed_seconds += seconds
        self._restart()
        return record


class MetricsLog:
    """Writes records to metrics.jsonl and TensorBoard. Only the first process has one."""

    def __init__(self, workdir: Workdir, tensorboard: bool, first_step: int):
        self._workdir = workdir
        self.profile_folder = workdir.path / "profile"
        self._board = None
        if tensorboard:
            # Events of steps that a resumed run makes again are hidden by TensorBoard from `purge_step` on.
            self._board = SummaryWriter(str(workdir.path / "tensorboard"), purge_step=first_step, flush_secs=30)

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Writes {"step", "split", name: value, ...}."""
        self._workdir.append_lines(METRICS_FILE, [{"step": step, "split": split, **values}])
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class Progress:
    """A bar on a terminal, plain lines elsewhere. Only the first process shows it."""

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
            self._bar.start()

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, step: int, record: dict[str, float]) -> None:
        """Shows the record of a window."""
        if not self._shown:
            return
        left = (self._total - step) * record["seconds_per_step"]
        status = (
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
            f"{record['real_tokens_per_second']:,.0f} real and {record['supervised_tokens_per_second']:,.0f} supervised tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        else:
            self._print(f"step {step}/{self._total}  {status}  {_duration(left)} left")

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            self._print(text)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Phases:
    """Seconds by phase of the run, for the summary."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> "_Phase":
        return _Phase(self, name)


class _Phase:
    def __init__(self, phases: Phases, name: str):
        self._phases, self._name = phases, name

    def __enter__(self):
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.elapsed = time.perf_counter() - self._start
        self._phases.seconds[self._name] = self._phases.seconds.get(self._name, 0.0) + self.elapsed


def _duration(seconds: float) -> str:
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
