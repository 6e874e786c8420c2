"""A learning curve for people and programs: a table and sentences in the terminal, curve.csv, curve.html, one JSON object."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sft_jax.experiments.curve import Curve
from sft_jax.experiments.fractions import CurvePlan
from sft_jax.experiments.learning import Learning
from sft_jax.experiments.runs import shown_path
from sft_jax.inspection.markup import escape
from sft_jax.inspection.page import Section, page
from sft_jax.inspection.page_numbers import table as html_table
from sft_jax.inspection.series import Line, curve
from sft_jax.printable import printable
from sft_jax.training.workdir import Workdir

_HEADINGS = ("data", "rows", "steps", "tokens a run", "runs", "metric", "95 % interval", "fitted")
_PLACES = 64  # of the line of the plot
_ADVICE = {
    "more data helps": "More data of this kind is worth having.",
    "flat": "More data of this kind is not worth its price: look at its quality, at what it lacks, at the model or the settings.",
    "cannot tell": "Do not decide by this curve: give more seeds (--seeds), or other fractions (--fractions); runs that are there stay.",
    "more data hurts": "Something is wrong with the data or the settings: more of these rows makes held-out ones worse.",
}


def run_lines(plan: CurvePlan) -> list[str]:
    """Returns a line for each fraction with the cost of a run, and one for all."""
    lines = []
    for fraction in dict.fromkeys(plan.fractions):
        places = [place for place, of_run in enumerate(plan.fractions) if of_run == fraction]
        cost = plan.costs[places[0]]
        lines.append(
            f"{str(fraction):>6} of the data  {plan.rows[places[0]]:>10,} rows  {cost.steps:>8,} steps  {cost.tokens:>14,} tokens  "
            f"x {len(places)} seed{'s' if len(places) > 1 else ''}"
        )
    return [*lines, str(plan)]


def plan_to_dict(plan: CurvePlan) -> dict[str, Any]:
    """Returns the runs of `--dry_run` for `--json`."""
    runs = [
        {"name": run.name, "fraction": str(fraction), "rows": rows, "seed": run.seed, "steps": cost.steps, "tokens": cost.tokens}
        for run, fraction, rows, cost in zip(plan.runs, plan.fractions, plan.rows, plan.costs, strict=True)
    ]
    return {"metric": str(plan.metric), "budget": plan.budget, "runs": runs}


def report(learning: Learning) -> RenderableType:
    """Returns the table of a curve for rich, the law, the gains and what to do."""
    table = Table(box=SIMPLE)
    for heading in _HEADINGS:
        table.add_column(str(learning.plan.metric) if heading == "metric" else heading, justify="right")
    for cells in _cells(learning):
        table.add_row(*cells)
    return Group(table, *(Text(printable(line)) for line in conclusions(learning)))


def conclusions(learning: Learning) -> list[str]:
    """Returns the law, the gains and the advice with its rule; failures and notes."""
    metric, found = learning.plan.metric, learning.curve
    lines = []
    if found:
        offset, slope, exponent = found.law
        sign = "-" if slope < 0 else "+"
        lines.append(
            f"{metric} = {offset:.4g} {sign} {abs(slope):.4g} * (rows / {found.rows:,})^-{exponent:.3g}; "
            f"a run with all data would be off by {found.noise:.2g} (one standard deviation)"
        )
        now = float(found.at(np.array([found.rows]))[0])
        for gain in found.gains:
            end = now - gain.value if found.lower else now + gain.value
            lines.append(
                f"{gain.multiple} times the data: from {now:.4f} to {end:.4f}, a gain of {gain.value:.4f} with a 95 % interval of "
                f"{gain.low:.4f} to {gain.high:.4f}"
            )
        lines.append(f"{found.verdict[0].upper()}{found.verdict[1:]}: {found.why}. {_ADVICE[found.verdict]}")
    lines += [f"failed: {result.run.name}: {result.message}" for result in learning.failed]
    return [*lines, *learning.notes]


def write_results(learning: Learning, work: Workdir) -> list[str]:
    """Writes curve.csv and curve.html into the folder of the curve and returns their paths."""
    content = {"curve.csv": _csv(learning), "curve.html": _html(learning)}
    for name, text in content.items():
        work.write_bytes(name, text.encode())
    return [shown_path(work.path / name) for name in content]


def to_dict(learning: Learning, files: Sequence[str]) -> dict[str, Any]:
    """Returns a curve for `--json`."""
    plan, found = learning.plan, learning.curve
    levels = [
        {
            "fraction": str(level.fraction), "rows": level.rows, "steps": level.steps, "tokens": level.tokens, "values": level.values,
            "mean": level.estimate.mean if level.estimate else None,
            "interval": [level.estimate.low, level.estimate.high] if level.estimate and level.estimate.low is not None else None,
        }
        for level in learning.levels
    ]  # fmt: skip
    return {
        "metric": str(plan.metric), "lower_is_better": plan.metric.lower, "budget": plan.budget, "rows": plan.whole, "levels": levels,
        "law": dict(zip(("a", "b", "c"), found.law, strict=True)) if found else None,
        "noise": found.noise if found else None,
        "gains": [{"multiple": gain.multiple, "value": gain.value, "interval": [gain.low, gain.high]} for gain in found.gains] if found else [],
        "verdict": found.verdict if found else "cannot tell", "why": found.why if found else None, "failed": len(learning.failed),
        "notes": learning.notes, "files": list(files),
    }  # fmt: skip


def _cells(learning: Learning) -> list[list[str]]:
    fitted = _fitted(learning.curve, [level.rows for level in learning.levels])
    return [
        [
            str(level.fraction), f"{level.rows:,}", f"{level.steps:,}", f"{level.tokens:,}", str(len(level.values)),
            f"{level.estimate.mean:.4f}" if level.estimate else "-",
            f"{level.estimate.low:.4f} to {level.estimate.high:.4f}" if level.estimate and level.estimate.low is not None else "-", value,
        ]
        for level, value in zip(learning.levels, fitted, strict=True)
    ]  # fmt: skip


def _fitted(found: Curve | None, rows: list[int]) -> list[str]:
    return [f"{value:.4f}" for value in found.at(np.array(rows))] if found else ["-"] * len(rows)


def _csv(learning: Learning) -> str:
    """Returns a line a run."""
    plan, text = learning.plan, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "fraction", "rows", "seed", "steps", "tokens", "state", str(plan.metric), "seconds", "message"])
    for result, fraction, rows, cost in zip(learning.results, plan.fractions, plan.rows, plan.costs, strict=True):
        done = result.summary is not None
        writer.writerow([
            result.run.name, fraction, rows, result.run.seed, cost.steps, cost.tokens, "done" if done else "failed",
            plan.metric.of(result.summary) if done else "", f"{result.seconds:.1f}" if done else "", result.message or "",
        ])  # fmt: skip
    return text.getvalue()


def _html(learning: Learning) -> str:
    plan, found = learning.plan, learning.curve
    points = [(level.rows, value) for level in learning.levels for value in level.values]
    line = None
    if found:
        rows = np.geomspace(min(plan.rows), plan.whole * found.gains[-1].multiple, _PLACES)
        low, high = found.band(rows)
        line = Line(rows.tolist(), found.at(rows).tolist(), low.tolist(), high.tolist())
    title = f"{plan.metric} over rows of training data; rings: runs, line: fitted law, band: its 95 % interval"
    figure = curve(points, title, "rows (logarithmic)", str(plan.metric), line=line, marker=(plan.whole, "all data"))
    told = "".join(f"<p>{escape(text)}</p>" for text in conclusions(learning))
    head = [str(plan.metric) if heading == "metric" else heading for heading in _HEADINGS]
    return page(
        f"Learning curve of {plan.metric}",
        [
            Section("curve", "Curve", f'<div class="plots">{figure}</div>{told}'),
            Section("fractions", "Fractions", html_table(head, _cells(learning), numbers=set(range(len(head))))),
        ],
    )
