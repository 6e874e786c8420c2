"""A report as one page for a browser, that loads nothing and can be read without scripts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sft_jax.diagnosis.causes import CAUSES
from sft_jax.diagnosis.curves import Curve
from sft_jax.diagnosis.diagnose import Report, losses_of, scores_of
from sft_jax.diagnosis.finding import number
from sft_jax.diagnosis.page_samples import samples_section
from sft_jax.diagnosis.run_files import RunFiles
from sft_jax.diagnosis.terminal import HEALTH_HEAD, health_rows, measured_lines, not_looked_for_line, value_cells, value_columns
from sft_jax.dynamics.analysis import Analysis
from sft_jax.errors import UserError
from sft_jax.inspection.markup import escape
from sft_jax.inspection.page import Section, page
from sft_jax.inspection.page_faults import fault_section
from sft_jax.inspection.page_numbers import table
from sft_jax.inspection.plots import grouped_bars
from sft_jax.inspection.series import line_plot

_POINTS = 1_000  # of a curve; more are finer than a pixel, and are averaged


def write_page(path: Path, report: Report) -> str:
    """Writes the page of a report and returns a line that says so. Raises UserError where it cannot be written."""
    run = report.run
    sections = [
        Section("causes", "Causes", causes_section(report)),
        Section("losses", "Loss", _losses(run)),
        Section("learning", "Learning rate and updates", _learning(run)),
        Section("time", "Throughput and time", _time(run)),
        Section("data", "Data", _data(report)),
        Section("answers", "Answers before and after", _answers(report)),
        *([Section("scores", "Scores", _scores(run))] if any(scores_of(run, name) for name in run.evals) else []),
        *([Section("ledger", "Ledger", _ledger(report.ledger))] if report.ledger else []),
        *([Section("models", "Models beside each other", _paragraphs(measured_lines(report)))] if measured_lines(report) else []),
        Section("notes", "What is missing or was not looked at", _paragraphs(report.notes) or "<p>Nothing.</p>"),
    ]
    return write(path, f"Report: {run.shown}", sections)


def write(path: Path, title: str, sections: Sequence[Section]) -> str:
    """Writes a page and returns a line that says so. Raises UserError where it cannot be written."""
    try:
        path.write_text(page(title, sections), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: {path} cannot be written ({error.strerror}); name a file in a folder that is there.") from error
    return f"{path} is written."


def causes_section(report: Report) -> str:
    """Returns what was found, the first cause first."""
    looked_for = f"<p>{'Also looked' if report.findings else 'None was found. Looked'} for: "
    looked_for += f"{escape(', '.join(name for name in report.looked_for if name not in report.findings))}.</p>"
    if report.not_looked_for:
        looked_for += f"<p>Not looked for: {escape(not_looked_for_line(report))}</p>"
    parts = []
    for place, (name, finding) in enumerate(report.findings.items(), 1):
        evidence = table(("evidence", "value"), [(key, number(value)) for key, value in finding.evidence.items()], numbers={1})
        parts.append(
            f'<article><header><h3>{place}. {escape(name)}</h3>{escape(CAUSES[name].about)}</header><p class="problem">{escape(finding.says)}</p>'
            f'<div class="document"><p class="meta">{escape(finding.why)}</p><p class="meta">Remedy: {escape(finding.remedy)}</p>'
            f"{evidence}</div></article>"
        )
    return "".join(parts) + looked_for


def plot(curves: Sequence[tuple[str, Curve]], title: str, y_label: str, *, logarithmic: bool = False) -> str:
    """Returns curves over the steps of a run, nothing where none has a value."""
    series = [(name, *_thinned(curve)) for name, curve in curves if curve]
    return line_plot(series, title, "step", y_label, logarithmic=logarithmic) if series else ""


def loss_curves(run: RunFiles, prefix: str = "") -> list[tuple[str, Curve]]:
    """Returns the training loss and that of each held-out set, with their names behind `prefix`."""
    return [(f"{prefix}training", run.curve("loss")), *((f"{prefix}{name}", run.eval_curve(name)) for name in run.evals)]


def _losses(run: RunFiles) -> str:
    rows, head = [], value_columns(run)
    for name in run.evals:
        losses = losses_of(run, name)
        if losses["first"] is not None:
            rows.append([name, *value_cells(losses, head), f"{losses['best']:.4f} (step {losses['best_step']:,})"])
    plots = plot(loss_curves(run), "Loss", "nats a token", logarithmic=True)
    accuracy = [("training", run.curve("accuracy")), *((name, run.eval_curve(name, "accuracy")) for name in run.evals)]
    plots += plot(accuracy, "Share of supervised tokens that are the most probable ones", "share")
    numbers = "<p>There is no held-out set (data.eval).</p>"
    if rows:
        numbers = table(("held-out set", *head.values(), "best"), rows, numbers=set(range(1, len(head) + 2)))
    return f'{numbers}<p></p><div class="plots">{plots}</div>'


def _learning(run: RunFiles) -> str:
    plots = plot([("learning rate", run.curve("learning_rate"))], "Learning rate", "rate")
    plots += plot([("update", run.curve("update_ratio"))], "Norm of an update by that of the parameters", "share", logarithmic=True)
    plots += plot([("gradient", run.curve("grad_norm"))], "Norm of the gradient before clipping", "norm", logarithmic=True)
    return f'<div class="plots">{plots}</div>'


def _time(run: RunFiles) -> str:
    summary = run.summary
    facts = [
        (name, f"{summary[key]:{form}}") for name, key, form in (
            ("real tokens/s", "real_tokens_per_second", ",.0f"), ("supervised tokens/s", "supervised_tokens_per_second", ",.0f"),
            ("seconds a step", "seconds_per_step", ".3f"), ("MFU", "mfu", ".1%"), ("seconds to first step", "seconds_to_first_step", ",.1f"),
        ) if isinstance(summary.get(key), (int, float))
    ]  # fmt: skip
    seconds = {name: value for name, value in (summary.get("seconds") or {}).items() if isinstance(value, (int, float)) and value > 0}
    rates = [(name, run.curve(f"{name}_tokens_per_second")) for name in ("real", "supervised")]
    plots = plot(rates, "Tokens a second", "tokens/s")
    if seconds:
        whole = np.array([round(value) for value in seconds.values()], np.int64)
        title = f"Where {sum(seconds.values()):,.0f} s went"
        plots += grouped_bars(list(seconds), [("seconds", whole)], title, "share of the time of the last start")
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{boxes}</dl><p></p><div class="plots">{plots}</div>'


def _data(report: Report) -> str:
    run = report.run
    rows = []
    for split, sets in (("train", run.training_sets), ("eval", run.data_report.get("eval", {}))):
        for name, found in sets.items():
            length = found.get("over_length", {})
            rows.append([
                f"{name} ({split})", str(found.get("format", "")),
                *(f"{found.get(key, 0):,}" for key in ("rows_read", "documents", "used_tokens", "used_supervised_tokens")),
                f"{found.get('supervised_share', 0):.1%}", f"{found.get('rows_left_out', {}).get('total', 0):,}",
                f"{length.get('dropped', 0):,} / {length.get('cut', 0):,} / {length.get('split', 0):,}",
            ])  # fmt: skip
    head = ("set", "format", "rows", "documents", "tokens", "supervised tokens", "share", "rows left out", "dropped / cut / split by length")
    faults = f"<h3>Faults of rows</h3>{fault_section(report.evidence.data)}" if report.evidence.data else ""
    return (table(head, rows, numbers=set(range(2, 9))) if rows else "<p>data_report.json is not there.</p>") + faults


def _answers(report: Report) -> str:
    rows = health_rows(report)
    if not rows:
        return "<p>The run has answered no prompts (eval.generate).</p>"
    return table(HEALTH_HEAD, rows, numbers=set(range(1, 8))) + samples_section(report.run.judged_samples or report.evidence.answers)


def _scores(run: RunFiles) -> str:
    head = value_columns(run)
    rows = [[name, key, *value_cells(values, head)] for name in run.evals for key, values in scores_of(run, name).items()]
    return table(("held-out set", "score", *head.values()), rows, numbers=set(range(2, len(head) + 2)))


def _ledger(analysis: Analysis) -> str:
    parts = [f"<p>{analysis.examples:,} examples came up {analysis.exposures:,} times.</p>"]
    rows = [[name, kind.about, f"{kind.count:,}"] for name, kind in analysis.kinds.items()]
    parts.append(table(("kind", "what it is", "examples"), rows, numbers={2}))
    found = [(name, entry) for name, kind in analysis.kinds.items() for entry in kind.examples]
    shown = [[name, entry.where, entry.prompt, entry.answer, entry.detail] for name, entry in found]
    if shown:
        parts.append("<p></p>" + table(("kind", "example", "prompt", "answer", "loss"), shown, where=1, tall=True))
    return "".join(parts)


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of at most so many points, means of neighbours."""
    size = -(-len(curve.steps) // _POINTS)
    begins = np.arange(0, len(curve.steps), size)
    counts = np.diff([*begins, len(curve.steps)])
    return tuple(np.add.reduceat(part.astype(np.float64), begins) / counts for part in (curve.steps, curve.values))
