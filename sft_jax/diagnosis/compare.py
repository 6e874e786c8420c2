"""Two runs beside each other: what was set otherwise, and what came of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sft_jax.config import to_dict
from sft_jax.diagnosis.diagnose import Report, losses_of, scores_of
from sft_jax.diagnosis.page import causes_section, loss_curves, plot, write
from sft_jax.diagnosis.page_samples import row_of, values_of
from sft_jax.diagnosis.run_files import RunFiles
from sft_jax.diagnosis.terminal import causes_text
from sft_jax.evaluation.bootstrap import interval
from sft_jax.evaluation.scoring import ratio
from sft_jax.inspection.markup import escape
from sft_jax.inspection.page import Section
from sft_jax.inspection.page_numbers import table
from sft_jax.printable import printable


@dataclass(frozen=True)
class Difference:
    """What the second run has more of, over the prompts that both have answered: a mean of the scores of single answers."""

    mean: float
    interval: tuple[float, float] | None  # 95 %, over the prompts
    prompts: int


@dataclass(frozen=True)
class Comparison:
    """Two reports."""

    reports: tuple[Report, Report]
    config: dict[str, tuple[Any, Any]]  # keys that differ
    values: dict[tuple[str, str], tuple[float | None, float | None]]  # of the results, by held-out set and name
    answers: dict[tuple[str, str], Difference]  # by held-out set and scorer
    notes: tuple[str, ...]  # what makes the runs hard to compare

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain lists and dicts."""
        return {
            "runs": [report.to_json() for report in self.reports],
            "config": {key: list(pair) for key, pair in self.config.items()},
            "values": [{"set": name, "name": key, "result": list(pair)} for (name, key), pair in self.values.items()],
            "answers": [
                {"set": name, "scorer": key, "difference": found.mean, "interval": found.interval, "prompts": found.prompts}
                for (name, key), found in self.answers.items()
            ],
            "notes": list(self.notes),
        }


def compare(first: Report, second: Report) -> Comparison:
    """Returns two reports beside each other."""
    reports = (first, second)
    flat = [dict(_flat(to_dict(report.run.config))) for report in reports]
    config = {key: (flat[0].get(key), flat[1].get(key)) for key in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(key) != flat[1].get(key)}
    of = [_values(report.run) for report in reports]
    values = {key: (of[0].get(key), of[1].get(key)) for key in dict.fromkeys([*of[0], *of[1]])}
    answers = _answers(first.run, second.run)
    return Comparison(reports, config, values, answers, tuple(_notes(first.run, second.run, answers)))


def comparison_text(comparison: Comparison) -> RenderableType:
    """Returns what rich prints of a comparison."""
    parts: list[RenderableType] = []
    for report in comparison.reports:
        parts.append(Text(printable(f"{report.run.shown}: {report.run.steps:,} steps{'' if report.run.summary else ', not finished'}")))
        parts += causes_text(report)
    for head, rows in _tables(comparison):
        shown = Table(expand=False)
        for column, name in enumerate(head):
            shown.add_column(Text(printable(name)), justify="right" if column else "left", overflow="fold")
        for row in rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))
        parts.append(shown)
    if not comparison.config:
        parts.append(Text("The configurations are the same."))
    return Group(*parts, *(Text(printable(f"Note: {note}")) for note in comparison.notes))


def write_comparison(path: Path, comparison: Comparison) -> str:
    """Writes the page of a comparison and returns a line that says so. Raises UserError where it cannot be written."""
    first, second = comparison.reports
    names = _names(comparison)
    losses = [curve for report, name in zip(comparison.reports, names, strict=True) for curve in loss_curves(report.run, f"{name}: ")]
    pairs = [(name, report.run) for name, report in zip(names, comparison.reports, strict=True)]
    plots = plot(losses, "Loss", "nats a token", logarithmic=True)
    for key, title, label, scale in (
        ("learning_rate", "Learning rate", "rate", False), ("update_ratio", "Norm of an update by that of the parameters", "share", True),
        ("grad_norm", "Norm of the gradient before clipping", "norm", True), ("real_tokens_per_second", "Real tokens a second", "tokens/s", False),
    ):  # fmt: skip
        plots += plot([(name, run.curve(key)) for name, run in pairs], title, label, logarithmic=scale)
    tables = "<p></p>".join(table(head, rows, numbers=set(range(1, len(head)))) for head, rows in _tables(comparison))
    return write(path, f"{first.run.shown} and {second.run.shown}", [
        Section("curves", "Curves", f'<div class="plots">{plots}</div>'),
        Section("differences", "Differences", (tables or "<p>None.</p>") + "".join(f"<p>{escape(note)}</p>" for note in comparison.notes)),
        Section("causes0", f"Causes: {names[0]}", causes_section(first)),
        Section("causes1", f"Causes: {names[1]}", causes_section(second)),
    ])  # fmt: skip


def _tables(comparison: Comparison) -> Iterator[tuple[Sequence[str], list[list[str]]]]:
    """Yields the head and the rows of each table that has some."""
    names = _names(comparison)
    if comparison.config:
        yield ("key", *names), [[key, *(repr(value) for value in pair)] for key, pair in comparison.config.items()]
    if comparison.values:
        rows = []
        for (name, key), pair in comparison.values.items():
            more = f"{pair[1] - pair[0]:+.4f}" if None not in pair else ""
            rows.append([f"{name} {key}", *("-" if value is None else f"{value:.4f}" for value in pair), more])
        yield ("value of the result", *names, "difference"), rows
    if comparison.answers:
        rows = []
        for (name, key), found in comparison.answers.items():
            sure = "" if found.interval is None else f" [{found.interval[0]:+.4f}, {found.interval[1]:+.4f}]"
            rows.append([f"{name} {key}", f"{found.mean:+.4f}{sure}", f"{found.prompts:,}"])
        yield ("same prompts, mean over answers", "difference", "prompts"), rows


def _names(comparison: Comparison) -> tuple[str, str]:
    """Returns short names of the runs: the last part of their folders where that tells them apart."""
    first, second = (report.run for report in comparison.reports)
    return (first.folder.name, second.folder.name) if first.folder.name != second.folder.name else (first.shown, second.shown)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) and item.get("name") for item in value):  # data sets
            value = {item["name"]: item for item in value}
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _values(run: RunFiles) -> dict[tuple[str, str], float | None]:
    """Returns the values of the state that is the result, by held-out set and name."""
    found = {}
    for name in run.evals:
        losses = losses_of(run, name)
        if losses["result"] is not None:
            found |= {(name, "loss"): losses["result"]} | ({(name, "best loss"): losses["best"]} if losses["best"] != losses["result"] else {})
        found |= {(name, key): score["result"] for key, score in scores_of(run, name).items()}
    return found


# Fingerprints of manifest.json, and what follows where they differ.
_DIFFERING = {
    "tokens": "The training rows differ, or what was made of them.",
    "eval": "The held-out rows differ, or what was made of them, so values of one run are not those of the other on the same rows.",
    "tokenizer": "The tokenizers or their chat templates differ: losses, perplexities and accuracies are of other tokens; bits_per_byte can be compared.",
}


def _notes(first: RunFiles, second: RunFiles, answers: dict[tuple[str, str], Difference]) -> Iterator[str]:
    """Yields what makes the runs hard to compare."""
    for run in (first, second):
        if run.best_step not in (None, run.steps):
            yield f"The result of {run.shown} is its state of step {run.best_step:,} of {run.steps:,} (checkpoint.best={run.config.checkpoint.best})."
    ours, theirs = (run.manifest.get("fingerprints", {}) for run in (first, second))
    for name, note in _DIFFERING.items():
        if name in ours and name in theirs and ours[name] != theirs[name]:
            yield f"{note} (manifest.json)"
    if first.samples and second.samples and not answers:
        yield "No prompt was answered by both runs, so there is no difference over the same prompts."


def _answers(first: RunFiles, second: RunFiles) -> dict[tuple[str, str], Difference]:
    """Returns by how much the answers of the second run's result score higher, over the prompts that those of both have answered."""
    of = []
    for run in (first, second):
        last = {(sample["set"], *row_of(sample), sample["prompt"]): values_of(sample) for sample in run.judged_samples}  # later ones win
        of.append(last)
    pairs: dict[tuple[str, str], list[float]] = {}
    for key in of[0].keys() & of[1].keys():
        for scorer in of[0][key].keys() & of[1][key].keys():
            pairs.setdefault((key[0], scorer), []).append(of[1][key][scorer] - of[0][key][scorer])
    found = {}
    for key, differences in sorted(pairs.items()):
        statistics = np.stack([np.sort(differences), np.ones(len(differences))], axis=1)
        ends = interval(statistics, ratio)
        found[key] = Difference(float(np.mean(differences)), None if ends is None else tuple(ends), len(differences))
    return found
