"""The results of an evaluation for people: a table in the terminal, and a bar while it runs."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table

_LOSSES = (("loss", "loss", ".4f"), ("perplexity", "perplexity", ",.3f"), ("bits_per_byte", "bits/byte", ".4f"), ("accuracy", "accuracy", ".4f"))
_COUNTS = (("tokens", "tokens"), ("examples", "examples"))


def tables(found: Mapping[str, Any]) -> list[rich.table.Table]:
    """Returns the losses, the scores and the benchmarks, where there are some, of what `Evaluation.to_dict` says.

    A row is a set, or a slice of one. In brackets are 95 % bootstrap intervals over documents and answers; of benchmarks a
    standard error follows the value.
    """
    losses = new_table(["held-out set"], [*(heading for _, heading, _ in _LOSSES), *(heading for _, heading in _COUNTS)])
    names = list(dict.fromkeys(name for values in found["sets"].values() for name in values.get("scores", ())))
    scores = new_table(["answers"], [*names, "answers"])
    for name, values in found["sets"].items():
        rows = [(name, values)]
        for column, parts in values.get("slices", {}).items():
            rows += [(f"  {column}={part}", of_part) for part, of_part in parts.items()]
        for label, row in rows:
            cells = [format(row[key], form) if row.get(key) is not None else "-" for key, _, form in _LOSSES]
            cells[0] += brackets(row["loss_interval"])
            losses.add_row(label, *cells, *(f"{row[key]:,}" for key, _ in _COUNTS))
            if "scores" in row:
                of = [row["scores"][scorer] for scorer in names]
                cells = ["-" if score["value"] is None else f"{score['value']:.4f}{brackets(score['interval'])}" for score in of]
                scores.add_row(label, *cells, f"{max(score['answers'] for score in of):,}")
    benchmarks = new_table(["benchmark"], ["metric", "value", "examples"])
    for task, values in found.get("benchmarks", {}).items():
        for metric, value in values.items():
            if metric != "examples" and "_stderr" not in metric:
                error = values.get(metric.replace(",", "_stderr,", 1))
                shown = f"{value:.4f}" + (f" \u00b1 {error:.4f}" if error is not None else "")
                benchmarks.add_row(task, metric.removesuffix(",none"), shown, str(values.get("examples", "")))
    filled = ((losses, found["sets"]), (scores, names), (benchmarks, found.get("benchmarks")))
    return [table for table, rows in filled if rows]


def new_table(texts: Sequence[str], numbers: Sequence[str]) -> rich.table.Table:
    """Returns a table without rows: columns of texts, then columns of numbers."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def brackets(interval: list[float] | None) -> str:
    """Returns an interval as it stands behind a value, nothing where there is none."""
    return "" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]"


def print_tables(found: Mapping[str, Any]) -> None:
    """Prints the tables on standard output; where it is no terminal, as wide as they are."""
    console = rich.console.Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = rich.console.Console(highlight=False, markup=False, width=240)
    for table in tables(found):
        console.print(table)


class EvaluationProgress:
    """Shows how far an evaluation is, as a context manager whose value takes note of it. On standard error, on a terminal only."""

    def __init__(self, shown: bool = True):
        console = rich.console.Console(file=sys.stderr, highlight=False)
        self._bar, self._tasks = None, {}
        if shown and console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False), rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(), console=console, transient=True,
            )  # fmt: skip

    def __enter__(self) -> "EvaluationProgress":
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """Takes note that `done` of `total` are done of what `what` names."""
        if self._bar is None:
            return
        if not self._tasks:
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done)

    def __exit__(self, *error) -> None:
        if self._bar is not None and self._tasks:
            self._bar.stop()
