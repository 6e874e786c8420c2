"""What a run has left in its folder, as far as it is there. What is missing or torn is said, and stops nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_jax.config import Config
from sft_jax.diagnosis.curves import Curve
from sft_jax.diagnosis.shapes import EVALUATION, FILES, SAMPLE, TRAINING, fits, fitting
from sft_jax.dynamics.analysis import read_run_config
from sft_jax.dynamics.parts import FOLDER, Documents, read_documents
from sft_jax.errors import UserError
from sft_jax.hf.load import spec_of
from sft_jax.hf.restore import model_source
from sft_jax.hf.source import ADAPTER, EXPORT, best_step_of, has_export, is_adapter
from sft_jax.training.metrics import METRICS_FILE, SAMPLES_FILE, TRAIN, Record
from sft_jax.training.workdir import Workdir


@dataclass(frozen=True)
class RunFiles:
    """The files of a run. Dicts are as the run wrote them, empty where the file is not there."""

    folder: Path
    shown: str  # the folder as the user named it
    config: Config
    manifest: dict[str, Any]
    summary: dict[str, Any]  # empty of a run that has not finished
    data_report: dict[str, Any]
    train: tuple[Record, ...]  # of metrics.jsonl, in the order of the steps
    evals: dict[str, tuple[Record, ...]]  # by held-out set, in the order of the steps
    samples: tuple[Record, ...]
    documents: Documents | None  # of the ledger
    exported: Path | None  # the export or the adapter, where there is one
    vocabulary: int | None  # tokens that the model has, None where its config.json is not at hand
    notes: tuple[str, ...]  # what is missing or torn

    def curve(self, name: str) -> Curve:
        """Returns a value of the training records over the steps, without those that have none."""
        return Curve.of(self.train, name)

    def eval_curve(self, held_out: str, name: str = "loss") -> Curve:
        """Returns a value of the evaluations of a held-out set over the steps."""
        return Curve.of(self.evals.get(held_out, ()), name)

    @property
    def steps(self) -> int:
        """The newest step in the log."""
        return max((record["step"] for record in self.train), default=0)

    @property
    def best_step(self) -> int | None:
        """The step of the best state, where the run has finished and takes that for its result (`checkpoint.best`)."""
        return best_step_of(self.summary)

    @property
    def result_step(self) -> int:
        """The step whose state is the result: what is exported, and what is judged."""
        return self.steps if self.best_step is None else self.best_step

    @property
    def judged_samples(self) -> tuple[Record, ...]:
        """Answers up to those of the result; all of them where there are none so early."""
        return tuple(sample for sample in self.samples if sample["step"] <= self.result_step) or self.samples

    @property
    def training_sets(self) -> dict[str, dict[str, Any]]:
        """What data_report.json says of each training set."""
        return self.data_report.get("train", {}).get("sets", {})


def read_run(path: str | Path) -> RunFiles:
    """Reads the folder of a run. Raises UserError where it is none, or its config.json cannot be read."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path}: there is no such folder; name the folder of a run, such as runs/first.")
    if not (folder / METRICS_FILE).is_file() and not (folder / "data_report.json").is_file():
        raise UserError(f"{path}: is no run, since it holds neither {METRICS_FILE} nor data_report.json; name the --workdir of a run.")
    config = read_run_config(folder)
    work, notes = Workdir(folder, lock=False), []
    texts = {name: _read_json(work, name, notes) for name in FILES}
    if not texts["summary.json"]:
        notes.append("The run has not finished, or its summary.json is missing: what follows is of the run so far.")
    records = _fitting_records(sorted(_read_lines(work, METRICS_FILE, notes), key=lambda record: record["step"]), notes)
    evals: dict[str, list[Record]] = {}
    for record in records:
        if record.get("split") != TRAIN:
            evals.setdefault(str(record.get("split")), []).append(record)
    samples = _read_samples(work, notes) if (folder / SAMPLES_FILE).is_file() else []
    exported = folder / EXPORT if has_export(folder) else folder / ADAPTER if is_adapter(folder / ADAPTER) else None
    return RunFiles(
        folder, str(path), config, texts["manifest.json"], texts["summary.json"], texts["data_report.json"],
        tuple(record for record in records if record.get("split") == TRAIN), {name: tuple(found) for name, found in evals.items()},
        tuple(samples), _read_documents(folder, notes), exported,
        _vocabulary(config, exported, notes), tuple(notes),
    )  # fmt: skip


def _read_json(work: Workdir, name: str, notes: list[str]) -> dict[str, Any]:
    try:
        found = work.read_json(name)
    except (UserError, OSError) as error:
        notes.append(f"{name} cannot be read ({error}), so what it says is left out.")
        return {}
    if found is None and name != "summary.json":
        notes.append(f"{name} is missing, so what it says is left out.")
    misfits: list[str] = []
    found = fitting(found, FILES[name], "", misfits)
    if misfits:
        what = f"{', '.join(misfits[:3])}{' and more' if misfits[3:] else ''}" if misfits != [""] else "what it holds"
        notes.append(f"{name}: {what} has not the form in which a run writes it, and is left out.")
    return found or {}


def _read_lines(work: Workdir, name: str, notes: list[str]) -> list[Record]:
    try:
        found = work.read_lines(name)
        lines = (work.path / name).read_bytes() if (work.path / name).is_file() else None
    except OSError as error:
        notes.append(f"{name} cannot be read ({error.strerror}), so what it says is left out.")
        return []
    if lines is None:
        notes.append(f"{name} is missing, so nothing is known of what it says over the steps.")
        return []
    torn = lines.count(b"\n") + (not lines.endswith(b"\n") and bool(lines)) - len(found)
    if torn:
        notes.append(f"{name}: {torn:,} lines are torn or no records of a run, and are left out.")
    return found


def _fitting_records(records: list[Record], notes: list[str]) -> list[Record]:
    """Returns the records of metrics.jsonl without values that are no numbers where a run writes some."""
    misfits: list[str] = []
    found = [fitting(record, TRAINING if record.get("split") == TRAIN else EVALUATION, "", misfits) for record in records]
    if misfits:
        notes.append(f"{METRICS_FILE}: {len(misfits):,} values of {', '.join(dict.fromkeys(misfits))} are no numbers, and are left out.")
    return found


def _read_samples(work: Workdir, notes: list[str]) -> list[Record]:
    lines = _read_lines(work, SAMPLES_FILE, notes)
    found = [sample for sample in lines if fits(sample, SAMPLE)]
    if len(found) < len(lines):
        notes.append(f"{SAMPLES_FILE}: {len(lines) - len(found):,} lines are no answers as a run writes them, and are left out.")
    return found


def _read_documents(folder: Path, notes: list[str]) -> Documents | None:
    if not (folder / FOLDER).is_dir():
        return None
    try:
        return read_documents(folder / FOLDER)
    except UserError as error:
        notes.append(f"The ledger is left out: {error}")
        return None


def _vocabulary(config: Config, exported: Path | None, notes: list[str]) -> int | None:
    place = exported if exported is not None and exported.name == EXPORT else config.model.path
    try:
        return spec_of(model_source(place)).vocab_size
    except (UserError, OSError) as error:
        notes.append(f"The size of the vocabulary is not known: {error}")
        return None
