"""A report for people: what was found first, then the numbers."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sft_jax.diagnosis.causes import CAUSES
from sft_jax.diagnosis.diagnose import Report, losses_of, scores_of, value_at_result
from sft_jax.diagnosis.finding import Divergence, TextLoss, number
from sft_jax.diagnosis.health import Health
from sft_jax.diagnosis.run_files import RunFiles
from sft_jax.printable import printable


def report_text(report: Report) -> RenderableType:
    """Returns what rich prints of a report."""
    run = report.run
    parts: list[RenderableType] = [Text(printable(f"{run.shown}: {run.steps:,} steps{'' if run.summary else ', not finished'}"))]
    parts += causes_text(report)
    parts += [table for table in (_losses(report), _table(HEALTH_HEAD, health_rows(report))) if table is not None]
    parts += [Text(line) for line in measured_lines(report)]
    return Group(*parts, *(Text(printable(f"Note: {note}")) for note in report.notes))


def causes_text(report: Report) -> list[RenderableType]:
    """Returns the causes that were found, or among how many there is none; and what was not looked for."""
    unseen = f"ot looked for: {not_looked_for_line(report)}"
    if report.findings:
        parts = [finding_text(place, name, report) for place, name in enumerate(report.findings, 1)]
        return [*parts, Text(printable(f"N{unseen}"))] if report.not_looked_for else parts
    among = f"No cause was found among {len(report.looked_for)} of {len(CAUSES)}"
    return [Text(printable(f"{among}; n{unseen}" if report.not_looked_for else f"{among}."))]


def not_looked_for_line(report: Report) -> str:
    """Returns what was not looked for, and why, those together that have one reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in report.not_looked_for.items():
        reasons.setdefault(why, []).append(name)
    told = "; ".join(f"{', '.join(names)} ({why.rstrip('.')})" for why, names in reasons.items())
    return f"{told}."


def measured_lines(report: Report) -> list[str]:
    """Returns what was computed with the models, a line each."""
    measured = report.evidence.measured
    lines = []
    for what, loss in (("general text", measured.general), ("what the base writes", measured.own_samples)):
        if isinstance(loss, TextLoss):
            sure = "" if loss.rise_interval is None else f" [{loss.rise_interval[0]:+.3f}, {loss.rise_interval[1]:+.3f}]"
            lines.append(
                f"Loss of {what}: {loss.base:.3f} before, {loss.tuned:.3f} after, {loss.tuned - loss.base:+.3f}{sure} nats a token "
                f"({loss.texts:,} texts, {loss.tokens:,} tokens)."
            )
    for what, found in (("trained model from its base", measured.from_base), ("export from the checkpoint", measured.export)):
        if isinstance(found, Divergence):
            lines.append(f"KL of the {what} on neutral prompts: {found.kl:.3g} ± {found.error:.1g} nats a token ({found.tokens:,} tokens).")
    return lines


def finding_text(place: int, name: str, report: Report) -> RenderableType:
    """Returns a cause with its evidence; `place` is its number in the list."""
    finding = report.findings[name]
    head = Text(f"{place}. {name}", "bold red").append(f"  {CAUSES[name].about}", "default")
    shown = ", ".join(f"{key} {number(value)}" for key, value in finding.evidence.items())
    lines = [Text(printable(line)) for line in (finding.says, finding.why, f"Remedy: {finding.remedy}")]
    return Group(head, Padding(Group(*lines, Text(printable(shown), "dim")), (0, 0, 1, 3)))


def _losses(report: Report) -> Table | None:
    run = report.run
    rows = []
    for name in run.evals:
        losses = losses_of(run, name)
        if losses["first"] is not None:
            rows.append((f"{name} loss", losses, f"{losses['best']:.4f} at step {losses['best_step']:,}"))
        rows += [(f"{name} {key}", score, "") for key, score in scores_of(run, name).items()]
    if curve := run.curve("loss"):
        rows.append(("training loss", {"first": float(curve.values[0]), "last": float(curve.values[-1]), "result": value_at_result(run, curve)}, ""))
    head = value_columns(run)
    return _table(("", *head.values(), "best"), [(name, *value_cells(values, head), best) for name, values, best in rows])


def value_columns(run: RunFiles) -> dict[str, str]:
    """Returns which values of `losses_of` and `scores_of` are shown, with the heads of their columns."""
    shown = {"first": "first", "last": "last"}
    return shown if run.best_step in (None, run.steps) else {**shown, "result": f"step {run.best_step:,}, the result"}


def value_cells(values: Mapping[str, float | int | None], columns: Iterable[str]) -> list[str]:
    """Returns the cells of a row under these columns."""
    return ["" if values[name] is None else f"{values[name]:.4f}" for name in columns]


HEALTH_HEAD = ("answers", "step", "number", "ended", "characters", "of references", "repeating", "empty")


def health_rows(report: Report) -> list[tuple[str, ...]]:
    """Returns rows under HEALTH_HEAD: of each set the first answers, where there are earlier ones, and the last."""
    rows = []
    for name, last in report.evidence.health.items():
        first = report.evidence.health_first.get(name)  # none where the answers were made for the report
        rows += [_health_row(name, health) for health in (first, last) if health is not None and (health is last or health.step != last.step)]
    return rows


def _health_row(name: str, health: Health) -> tuple[str, ...]:
    return (
        name, f"{health.step:,}", f"{health.answers:,}", f"{health.ended:.1%}", f"{health.length:,.0f}", f"{health.reference_length:,.0f}",
        f"{health.repeating:.1%}", f"{health.empty:.1%}",
    )  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table | None:
    if not rows:
        return None
    table = Table(expand=False)
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
