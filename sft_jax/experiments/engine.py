"""Many runs, one after the other, in one process: those that have finished stay, one that was stopped goes on.

A run is `sft_jax.training.run.fit` and nothing else, in a folder of its own, so whatever reads a run reads these. Prepared
data are shared by the store, compiled programs by the compilation cache, which several CPU devices of one process have not (the step
takes what a sweep changes most, learning rate, length of the schedule and seed, as arguments). Nothing of a run stays in memory when
the next begins.
"""

import contextlib
import datetime
import gc
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_jax.config import to_dict
from sft_jax.config_checks import check_local
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.evaluation.evals import Between
from sft_jax.experiments.cost import Cost
from sft_jax.experiments.runs import FAILED, RUNS, Run, changes, check_folders, shown_path
from sft_jax.training.clusters import check_alone
from sft_jax.training.progress import duration
from sft_jax.training.resolved import resolved
from sft_jax.training.run import fit
from sft_jax.training.signals import StopSignal
from sft_jax.training.workdir import Workdir

_OUTPUT = "output.txt"  # what a run prints, in its folder
_STEP = re.compile(r"step (\d+)/(\d+) ")  # how a line about a training step begins
_TOKENS = "tokens of all runs"
_DATA = "tokens", "eval", "tokenizer"  # fingerprints of manifest.json by which runs are compared
_BEGUN = "experiment.json"  # the day on which an experiment has begun

Log = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """How a run has ended."""

    run: Run
    folder: Path
    summary: dict[str, Any] | None  # None: it has failed
    message: str | None  # why it has failed
    data: dict[str, str] | None  # fingerprints of what it was trained and evaluated on

    @property
    def seconds(self) -> float | None:
        """How long its last start took."""
        return sum(value for name, value in self.summary["seconds"].items() if name != "start") if self.summary else None


def pinned(raw: dict[str, Any], workdir: str | None) -> dict[str, Any]:
    """Returns a recipe whose templates take one day for today in all runs, also in those that begin after midnight.

    It is the recipe's (data.date), else that on which the experiment in `workdir` has begun, else today.
    """
    begun = (_read(Path(workdir) / _BEGUN) or {}).get("date") if workdir else None
    data = raw.get("data") or {}
    return {**raw, "data": {**data, "date": data.get("date") or begun or _today()}} if isinstance(data, dict) else raw


def open_experiment(workdir: str) -> Workdir:
    """Returns the folder of an experiment, locked. Raises UserError for a URL, and in a job of several processes."""
    check_local("--workdir", workdir)
    check_alone("an experiment", os.environ)
    work = Workdir(workdir)
    if not (work.path / _BEGUN).is_file():
        work.write_json(_BEGUN, {"date": _today()})
    return work


def _today() -> str:
    return datetime.date.today().isoformat()


def run_all(
    runs: Sequence[Run], costs: Sequence[Cost], work: Workdir, retry: bool, log: Log, keep_states: bool = True,
    progress: Between = lambda what, done, total: None,
) -> list[Result]:  # fmt: skip
    """Runs what has not been run yet and returns how each run has ended, in the order of `runs`.

    A run that ends with a UserError, such as a loss that is not finite, is noted in its folder, and the others go on.

    Args:
        retry: runs that have failed before are started again; else they stay failed.
        log: takes a line when a run begins and ends.
        keep_states: the checkpoints of a run stay when it has finished.
        progress: takes note of the tokens that are trained on, of those of all runs.

    Raises:
        UserError: a folder holds a run with another configuration.
        StoppedBySignal: the run at work has saved its state; the same call goes on.
    """
    check_folders(runs, work)
    with StopSignal() as stop:  # beside it each run has one of its own
        stop.where = f"after 0 of {len(runs)} runs"
        return _run_all(runs, costs, work, stop, retry, log, keep_states, progress)


def _run_all(
    runs: Sequence[Run], costs: Sequence[Cost], work: Workdir, stop: StopSignal, retry: bool, log: Log, keep_states: bool, progress: Between
) -> list[Result]:
    results: list[Result | None] = [_ended(run, work, retry) for run in runs]
    left = [number for number, result in enumerate(results) if result is None]
    if len(left) < len(runs):
        log(f"{len(runs) - len(left)} of {len(runs)} runs have ended before.")
    whole = sum(cost.tokens for cost in costs)
    done = whole - sum(costs[number].tokens for number in left)
    progress(_TOKENS, done, whole)
    seconds = tokens = 0.0
    for place, number in enumerate(left):
        run = runs[number]
        stop.where = f"after {len(runs) - len(left) + place} of {len(runs)} runs"
        log(f"run {number + 1} of {len(runs)}: {run.name}")
        begun = time.perf_counter()
        own = costs[number].tokens
        results[number] = result = _run(run, work, log, lambda step, steps, done=done, own=own: progress(_TOKENS, done + own * step // steps, whole))
        done += own
        progress(_TOKENS, done, whole)
        check_same_data([result for result in results if result is not None])  # at once: the next ones would be in vain
        if result.summary and not keep_states:
            shutil.rmtree(result.folder / "checkpoints", ignore_errors=True)
        seconds, tokens = seconds + time.perf_counter() - begun, tokens + costs[number].tokens
        rest = sum(costs[other].tokens for other in left[place + 1 :])
        told = f"failed: {result.message}" if result.summary is None else f"done in {duration(time.perf_counter() - begun)}"
        log(f"  {told}" + (f"; about {duration(seconds / tokens * rest)} left" if rest else ""))
    return [result for result in results if result is not None]


def check_same_data(results: Sequence[Result]) -> str | None:
    """Returns a note where runs were evaluated on other held-out rows because of keys that they differ in.

    Raises UserError where the rows differ though the configuration does not: the files, the template or the tokenizer changed
    in between, and the runs cannot be compared.
    """
    done = [result for result in results if result.data is not None]
    for other in done[1:]:
        first = next(one for one in done if _data_settings(one.run) == _data_settings(other.run))
        changed = [name for name in _DATA if first.data[name] != other.data[name]]
        if changed:
            raise UserError(
                f"{shown_path(other.folder)}: its data ({', '.join(changed)}) are not those of {shown_path(first.folder)}: files, "
                "template or tokenizer changed between the two runs, so they do not compare. Restore them, or use another --workdir."
            )
    if len({result.data["eval"] for result in done}) > 1:
        return "Held-out rows are not the same in all runs, since a key of theirs was changed, so their losses may not compare."
    return None


def _data_settings(run: Run) -> tuple[Any, ...]:
    data = to_dict(run.config)["data"]
    for item in data["train"]:
        item["cap"] = None  # a sample of the same rows
    return data, run.config.model.path, run.config.adapter.path


def _ended(run: Run, work: Workdir, retry: bool) -> Result | None:
    """Returns how a run has ended before, or None where it is to be run."""
    folder = work.path / RUNS / run.name
    summary, failed = _read(folder / "summary.json"), _read(folder / FAILED)
    if summary and summary.get("finished"):
        return _done(run, folder, summary)
    if failed and not retry and not changes(failed["config"], run):
        return Result(run, folder, None, failed["message"], None)
    return None


def _run(run: Run, work: Workdir, log: Log, made: Callable[[int, int], None]) -> Result:
    """Runs one; `made` is told of (step, steps) when it has made a step that it logs."""
    folder = work.path / RUNS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    try:
        with _told_to(folder / _OUTPUT, log, made):
            return _done(run, folder, fit(run.config, folder))
    except UserError as error:
        message = str(error)
        work.write_json(f"{RUNS}/{run.name}/{FAILED}", {"message": message, "config": to_dict(resolved(run.config))})
        return Result(run, folder, None, message, None)
    except StoppedBySignal as stopped:
        raise StoppedBySignal(f"{run.name}: {stopped}") from stopped
    finally:
        gc.collect()  # arrays of a run that are held in cycles would be there beside the next one's


def _done(run: Run, folder: Path, summary: dict[str, Any]) -> Result:
    path = folder / "manifest.json"
    fingerprints = (_read(path) or {}).get("fingerprints")
    if not isinstance(fingerprints, dict) or not {*_DATA} <= fingerprints.keys():
        raise UserError(f"{path}: does not say what data the run, which has finished, was made with. Restore it, or remove the folder of the run.")
    return Result(run, folder, summary, None, fingerprints)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}). Restore it, or remove the folder of the run.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object. Restore it, or remove the folder of the run.")
    return found or None


class _Output(io.TextIOBase):
    """Writes what a run prints to a file, and gives lines about its steps to `log`."""

    def __init__(self, file: io.TextIOBase, log: Log, made: Callable[[int, int], None]):
        self._file, self._log, self._made, self._line = file, log, made, ""

    def write(self, text: str) -> int:
        self._file.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith("step "):
                self._log(f"  {line}")
            if found := _STEP.match(line):
                self._made(int(found[1]), int(found[2]))
        return len(text)

    def flush(self) -> None:
        self._file.flush()


class _Lines(io.TextIOBase):
    """Standard error without its terminal, so that a run draws no bars there: that of all runs stands there."""

    def __init__(self, file: io.TextIOBase):
        self._file = file

    def write(self, text: str) -> int:
        self._file.write(text)
        return len(text)

    def flush(self) -> None:
        self._file.flush()


@contextlib.contextmanager
def _told_to(path: Path, log: Log, made: Callable[[int, int], None]) -> Iterator[None]:
    with (
        open(path, "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(_Output(file, log, made)),
        contextlib.redirect_stderr(_Lines(sys.stderr)),
    ):
        yield

