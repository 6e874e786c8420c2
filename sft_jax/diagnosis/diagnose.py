"""The whole look at a run: its files, what can be computed of it, and the causes that are found in that."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sft_jax.diagnosis.bars import Bars, no_bars
from sft_jax.diagnosis.causes import CAUSES, find_causes, not_looked_for
from sft_jax.diagnosis.curves import Curve
from sft_jax.diagnosis.finding import DATA, EXPORTED_WEIGHTS, OWN_SAMPLES, PROMPTS, Evidence, Finding
from sft_jax.diagnosis.health import health_of
from sft_jax.diagnosis.prompts import PromptDifference, compare_prompts
from sft_jax.diagnosis.run_files import RunFiles, read_run
from sft_jax.doctor.check import diagnose as diagnose_data
from sft_jax.doctor.findings import Diagnosis
from sft_jax.dynamics.analysis import Analysis, analyse, open_ledger
from sft_jax.errors import UserError

Log = Callable[[str], None]
Measure = Callable[[Evidence], tuple[Evidence, list[str]]]  # -> the evidence with what the models say, notes
MOST_ROWS = 200_000  # of data that are looked at; more take minutes, which inspect_data --check is for
LISTED = 5  # examples of each kind of the ledger
_NO_MODELS = "nothing was computed with the models"


@dataclass(frozen=True)
class Report:
    """What is known of a run, and what was found."""

    evidence: Evidence
    findings: dict[str, Finding]  # by cause, what makes others appear first
    ledger: Analysis | None
    not_looked_for: dict[str, str]  # causes that could not be looked for, or only in part, and why
    notes: tuple[str, ...]  # what is missing, or was not looked at, and why

    @property
    def looked_for(self) -> list[str]:
        return [name for name in CAUSES if name not in self.not_looked_for]

    @property
    def run(self) -> RunFiles:
        return self.evidence.run

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain lists and dicts."""
        run, measured = self.run, self.evidence.measured
        return {
            "run": run.shown,
            "finished": bool(run.summary),
            "steps": run.steps,
            "result_step": run.result_step,
            "causes": [{"cause": name, "about": CAUSES[name].about, **finding._asdict()} for name, finding in self.findings.items()],
            "looked_for": self.looked_for,
            "not_looked_for": self.not_looked_for,
            "losses": {name: losses_of(run, name) for name in run.evals},
            "scores": {name: scores_of(run, name) for name in run.evals},
            "health": {name: health.to_json() for name, health in self.evidence.health.items()},
            "health_first": {name: health.to_json() for name, health in self.evidence.health_first.items()},
            "measured": dataclasses.asdict(measured),
            "data": {kind: result.rows for kind, result in self.evidence.data.kinds.items() if result.rows} if self.evidence.data else None,
            "ledger": {name: kind.count for name, kind in self.ledger.kinds.items()} if self.ledger else None,
            "seconds": run.summary.get("seconds"),
            "notes": list(self.notes),
        }


def examine(
    path: str | Path, *, quick: bool = False, measure: Measure | None = None, log: Log = lambda line: None, bars: Bars = no_bars
) -> Report:
    """Returns the report of a run.

    Args:
        path: the folder of the run.
        quick: reads the files of the run alone; not its data, tokenizers or models.
        measure: computes with the models of the run; None: that is left out.
        log: takes lines about what is done.
        bars: for what takes long.

    Raises UserError where the folder is no run.
    """
    run = read_run(path)
    notes = list(run.notes)
    if not any(record.get("update_ratio") for record in run.train):
        notes.append("metrics.jsonl has no update_ratio, as that of an older run, so learning rates are judged by the curves alone.")
    data, ledger, prompts = None, None, None
    if run.best_step not in (None, run.steps):
        notes.append(
            f"The result of the run is its state of step {run.best_step:,}, of {run.steps:,} the best by {run.config.checkpoint.best} "
            "(checkpoint.best); that is what is judged."
        )
    evidence = Evidence(run, health_of(run.judged_samples), health_of(run.samples, last=False))
    if quick:
        notes.append("--quick: data, templates, rows of the ledger and models were not looked at.")
        absent = {PROMPTS: "templates", DATA: "the data", EXPORTED_WEIGHTS: "models", OWN_SAMPLES: "models"}
        evidence = dataclasses.replace(evidence, absent={name: f"--quick leaves out {what}" for name, what in absent.items()})
        return _report(evidence, ledger, notes)
    absent = {EXPORTED_WEIGHTS: _NO_MODELS, OWN_SAMPLES: _NO_MODELS} if measure is None else {}
    prompts = _tried("Prompts of training and of the export were not compared", notes, lambda: _prompts(run, notes, absent), absent, PROMPTS)
    data = _tried("The data were not looked at", notes, lambda: _data(run, notes, log, absent, bars), absent, DATA)
    ledger = _tried("The ledger was not read", notes, lambda: analyse(open_ledger(run.folder, log), limit=LISTED))
    evidence = dataclasses.replace(evidence, prompts=prompts, data=data, absent=absent)
    if measure is not None:
        evidence, more = measure(evidence)
        notes += more
    return _report(evidence, ledger, notes)


def _report(evidence: Evidence, ledger: Analysis | None, notes: list[str]) -> Report:
    found = find_causes(evidence)
    return Report(evidence, found, ledger, not_looked_for(evidence, found), tuple(notes))


def _tried(what: str, notes: list[str], work: Callable[[], Any], absent: dict[str, str] | None = None, name: str = "") -> Any:
    """Returns what `work` gives; None, a note, and in `absent` the reason by `name`, where what it needs is not there any more."""
    try:
        return work()
    except UserError as error:
        notes.append(f"{what}: {error}")
        if absent is not None:
            absent[name] = str(error)
        return None


def _prompts(run: RunFiles, notes: list[str], absent: dict[str, str]) -> PromptDifference | None:
    if run.exported is None:
        absent[PROMPTS] = "there is no export"
        notes.append("Prompts of training and of inference were not compared, since there is no export.")
        return None
    return compare_prompts(run.config.model.path, run.exported, run.config.data)


def _data(run: RunFiles, notes: list[str], log: Log, absent: dict[str, str], bars: Bars) -> Diagnosis | None:
    reports = [*run.training_sets.values(), *run.data_report.get("eval", {}).values()]
    rows = sum(report.get("rows_read", 0) for report in reports)
    if rows > MOST_ROWS:
        notes.append(f"The data have {rows:,} rows, which take minutes: python -m sft_jax.inspect_data --check looks for duplicates and leakage.")
        absent[DATA] = f"the data have {rows:,} rows (python -m sft_jax.inspect_data --check)"
        return None
    with bars() as bar:
        return diagnose_data(run.config.data, log=log, between=partial(bar, "rows"))


def losses_of(run: RunFiles, name: str) -> dict[str, float | int | None]:
    """Returns the first, the best and the last loss of a held-out set, nats a token, the step of the best, and that of the result."""
    curve = run.eval_curve(name)
    if not curve:
        return {"first": None, "best": None, "best_step": None, "last": None, "result": None}
    best = int(curve.values.argmin())
    return {
        "first": float(curve.values[0]), "best": float(curve.values[best]), "best_step": int(curve.steps[best]), "last": float(curve.values[-1]),
        "result": value_at_result(run, curve),
    }  # fmt: skip


def value_at_result(run: RunFiles, curve: Curve) -> float | None:
    """Returns the value of the state that is the result, None where none was taken so early."""
    judged = curve.until(run.result_step)
    return float(judged.values[-1]) if judged else None


_NO_SCORES = ("step", "split", "loss", "tokens", "examples")


def scores_of(run: RunFiles, name: str) -> dict[str, dict[str, float | None]]:
    """Returns the first value, the last and that of the result, of everything else that was measured on a held-out set."""
    records = run.evals.get(name, ())
    names = dict.fromkeys(key for record in records for key, value in record.items() if isinstance(value, (int, float)) and key not in _NO_SCORES)
    found = {}
    for key in names:
        curve = run.eval_curve(name, key)
        found[key] = {"first": float(curve.values[0]), "last": float(curve.values[-1]), "result": value_at_result(run, curve)}
    return found
