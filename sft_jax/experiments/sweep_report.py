"""A sweep for people and programs: a table in the terminal, results.csv, results.md, results.html, one JSON object."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sft_jax.experiments.engine import Result
from sft_jax.experiments.runs import shown_path
from sft_jax.experiments.statistics import Estimate
from sft_jax.experiments.sweep import Plan, Point, Sweep
from sft_jax.inspection.markup import escape
from sft_jax.inspection.page import Section, page
from sft_jax.inspection.page_numbers import table as html_table
from sft_jax.inspection.series import Measured, curve, intervals
from sft_jax.printable import printable
from sft_jax.training.workdir import Workdir

_FEWEST = 3  # values of a key that are worth a plot over it


def run_lines(plan: Plan) -> list[str]:
    """Returns a line for each run, with its cost, and one for all."""
    width = max(len(run.name) for run in plan.runs)
    lines = [
        f"{printable(run.name):{width}}  {cost.steps:>8,} steps  {cost.tokens:>14,} tokens"
        for run, cost in zip(plan.runs, plan.costs, strict=True)
    ]
    return [*lines, str(plan)]


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Returns the runs of `--dry_run` for `--json`."""
    runs = [
        {"name": run.name, "overrides": run.labels, "seed": run.seed, "steps": cost.steps, "tokens": cost.tokens}
        for run, cost in zip(plan.runs, plan.costs, strict=True)
    ]
    return {"metric": str(plan.metric), "runs": runs}


def report(sweep: Sweep) -> RenderableType:
    """Returns the table of a sweep for rich, the best setting first, and what to make of it."""
    table = Table(box=SIMPLE)
    for heading, right in zip(_headings(sweep), _RIGHT, strict=True):
        table.add_column(Text(printable(heading)), justify="right" if right else "left", overflow="fold")
    for cells in _cells(sweep):
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return Group(table, *(Text(printable(line)) for line in conclusions(sweep)))


def conclusions(sweep: Sweep) -> list[str]:
    """Returns what may be said of the best setting, the failures and the notes."""
    best, tied = sweep.points[0], [point.name for point in sweep.points[1:] if point.tied]
    lines = []
    if best.estimate:
        better = "lowest" if sweep.metric.lower else "highest"
        lines.append(f"{better} {sweep.metric}: {best.name}, {mean_text(best.estimate)}, in {_folders(best)}")
    if tied:
        lines.append(f"No different from it by more than seeds are (Welch's t test, 5 %): {', '.join(tied)}")
    lines += [f"failed: {result.run.name}: {result.message}" for result in sweep.failed]
    return [*lines, *sweep.notes]


def write_results(sweep: Sweep, work: Workdir) -> list[str]:
    """Writes results.csv, results.md and results.html into the folder of the sweep and returns their paths."""
    content = {"results.csv": _csv(sweep), "results.md": _markdown(sweep), "results.html": _html(sweep)}
    for name, text in content.items():
        work.write_bytes(name, text.encode())
    return [shown_path(work.path / name) for name in content]


def to_dict(sweep: Sweep, files: Sequence[str]) -> dict[str, Any]:
    """Returns a sweep for `--json`."""
    points = [
        {
            "name": point.name, "overrides": point.labels, **_estimate_dict(point.estimate), "tied_with_best": point.tied,
            "missing": point.missing,
            "runs": [_run_dict(sweep, result) for result in point.results],
        }
        for point in sweep.points
    ]  # fmt: skip
    return {
        "metric": str(sweep.metric), "lower_is_better": sweep.metric.lower, "points": points, "failed": len(sweep.failed),
        "notes": sweep.notes, "files": list(files),
    }  # fmt: skip


def mean_text(estimate: Estimate) -> str:
    """Returns a mean with its interval and the number of its runs."""
    interval = f" [{estimate.low:.4f}, {estimate.high:.4f}]" if estimate.low is not None else ""
    return f"{estimate.mean:.4f}{interval} (n = {estimate.count})"


def _estimate_dict(estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return {"mean": None, "interval": None, "n": 0}
    return {
        "mean": estimate.mean, "interval": None if estimate.low is None else [estimate.low, estimate.high], "n": estimate.count,
    }  # fmt: skip


def _run_dict(sweep: Sweep, result: Result) -> dict[str, Any]:
    return {
        "name": result.run.name, "seed": result.run.seed, "folder": str(result.folder), "failed": result.message,
        "value": sweep.metric.of(result.summary) if result.summary else None, "seconds": result.seconds,
        "steps": result.summary["steps"] if result.summary else None,
        "evaluation": result.summary["eval_last"] if result.summary else None,
    }  # fmt: skip


_RIGHT = (False, True, True, True, True, False)


def _headings(sweep: Sweep) -> list[str]:
    return ["setting", str(sweep.metric), "95 % interval", "runs", "seconds a run", ""]


def _cells(sweep: Sweep) -> list[list[str]]:
    rows = []
    for number, point in enumerate(sweep.points):
        estimate, done = point.estimate, [result for result in point.results if result.summary]
        failed = len(point.results) - len(done)
        seconds = sum(result.seconds for result in done) / len(done) if done else None
        told = ["best"] if number == 0 and estimate else ["tied"] if point.tied else []
        rows.append([
            point.name, f"{estimate.mean:.4f}" if estimate else "-",
            f"{estimate.low:.4f} to {estimate.high:.4f}" if estimate and estimate.low is not None else "-",
            str(len(point.results)), f"{seconds:.1f}" if seconds is not None else "-",
            ", ".join([*told, *([f"{failed} failed"] if failed else [])]),
        ])  # fmt: skip
    return rows


def _folders(point: Point) -> str:
    done = [shown_path(result.folder) for result in point.results if result.summary]
    return done[0] + (f" and {len(done) - 1} more" if len(done) > 1 else "")


def _csv(sweep: Sweep) -> str:
    """Returns a line a run: what it differs in, all held-out values at its end, and its costs."""
    keys = list(dict.fromkeys(key for point in sweep.points for key in point.labels))
    values = {
        result.run.name: {
            f"{name}/{key}": value for name, found in result.summary["eval_last"].items() for key, value in found.items()
            if key not in ("intervals", "slices")  # summary.json has them
        }
        for result in sweep.results if result.summary
    }  # fmt: skip
    evaluated = list(dict.fromkeys(name for found in values.values() for name in found))
    costs = ("steps", "real_tokens_per_second")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *keys, "seed", "state", "value", *(f"last {name}" for name in evaluated), *costs, "seconds", "message"])
    for point in sweep.points:
        for result in point.results:
            summary = result.summary or {}
            writer.writerow([
                result.run.name, *(point.labels.get(key, "") for key in keys), result.run.seed, "done" if summary else "failed",
                sweep.metric.of(summary) if summary else "", *(values.get(result.run.name, {}).get(name, "") for name in evaluated),
                *(summary.get(name, "") for name in costs), "" if result.seconds is None else f"{result.seconds:.1f}",
                result.message or "",
            ])  # fmt: skip
    return text.getvalue()


def _markdown(sweep: Sweep) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(printable(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    rule = ["---:" if right else "---" for right in _RIGHT]
    told = "\n".join(f"{printable(text)}\n" for text in conclusions(sweep))
    return "\n".join([line(_headings(sweep)), line(rule), *map(line, _cells(sweep)), "", told])


def _html(sweep: Sweep) -> str:
    measured = [
        Measured(point.name, point.values, point.estimate.mean, point.estimate.low, point.estimate.high)
        for point in sweep.points if point.estimate
    ]  # fmt: skip
    title = f"{sweep.metric} by setting, the best one first; bars: 95 % intervals"
    figures = [intervals(measured, title, str(sweep.metric)), *_over_keys(sweep)] if measured else []
    told = "".join(f"<p>{escape(text)}</p>" for text in conclusions(sweep))
    numbers = {column for column, right in enumerate(_RIGHT) if right}
    return page(
        f"Sweep by {sweep.metric}",
        [
            Section("settings", "Settings", told + html_table(_headings(sweep), _cells(sweep), numbers=numbers)),
            Section("plots", "Plots", f'<div class="plots">{"".join(figures)}</div>'),
        ],
    )


def _over_keys(sweep: Sweep) -> list[str]:
    """Returns a plot of the metric over each key that is a positive number and has enough values."""
    figures = []
    for key in dict.fromkeys(key for point in sweep.points for key in point.labels):
        found = [(float(point.labels[key]), value) for point in sweep.points if _is_positive(point.labels.get(key)) for value in point.values]
        if len({x for x, _ in found}) >= _FEWEST:
            figures.append(curve(found, f"{sweep.metric} over {key}, a ring a run", f"{key} (logarithmic)", str(sweep.metric)))
    return figures


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
