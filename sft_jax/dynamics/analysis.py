"""The whole look at a ledger: histories, rules, conflicts and groups, with the rows that are shown."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.config import Config
from sft_jax.config_parsing import parse_config
from sft_jax.dynamics.bar import Bar
from sft_jax.dynamics.conflicts import Conflict, find_conflicts
from sft_jax.dynamics.groups import Group, make_groups
from sft_jax.dynamics.histories import Histories, make_histories
from sft_jax.dynamics.parts import FOLDER, Documents, read_documents, read_exposures
from sft_jax.dynamics.row_texts import MISSING, RunRows, open_training_rows, row_numbers
from sft_jax.dynamics.rules import RULES
from sft_jax.dynamics.trend import LEAST
from sft_jax.errors import UserError, did_you_mean
from sft_jax.printable import printable

CONFLICT = "conflicting_answers"
ABOUT_CONFLICTS = "another row has the same prompt and another answer"


@dataclass(frozen=True)
class Entry:
    """One example that is shown."""

    set: str
    file: str
    line: int
    turn: int  # -1, or the assistant turn of an example of its own
    score: float  # mean deviation from contemporaries, in robust standard deviations
    steps: tuple[int, ...]
    loss: tuple[float, ...]  # at each exposure, nats a supervised token
    accuracy: tuple[float, ...]  # at each exposure
    detail: str
    prompt: str  # the beginning of it, masked
    answer: str

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" + (f" (turn {self.turn})" if self.turn >= 0 else "")


@dataclass(frozen=True)
class Kind:
    """What a rule found."""

    about: str
    count: int  # examples, all of them
    examples: tuple[Entry, ...]  # the worst of them


@dataclass(frozen=True)
class Analysis:
    """What a ledger says."""

    run: str
    steps: int  # with exposures
    exposures: int
    examples: int  # documents that came up
    unseen: int  # documents that never did
    sets: tuple[Group, ...]
    slices: tuple[Group, ...]  # by `column`
    column: str  # "" where no slices were asked for
    kinds: dict[str, Kind]
    worst: tuple[Entry, ...]  # of all, by score
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain lists and dicts."""
        numbers = {name: getattr(self, name) for name in ("run", "steps", "exposures", "examples", "unseen")}
        kinds = {
            name: {"about": kind.about, "count": kind.count, "examples": [vars(entry) for entry in kind.examples]}
            for name, kind in self.kinds.items()
        }
        return {
            **numbers, "sets": [group.to_json() for group in self.sets], "column": self.column or None,
            "slices": [group.to_json() for group in self.slices], "kinds": kinds, "worst": [vars(entry) for entry in self.worst],
            "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class OpenLedger:
    """The ledger of a run, and the rows that it is of."""

    folder: Path
    config: Config
    documents: Documents
    histories: Histories
    rows: RunRows
    row_of: np.ndarray  # int64 [n], the row over all sets of each history
    notes: tuple[str, ...]


def open_ledger(workdir: str | Path, log: Callable[[str], None]) -> OpenLedger:
    """Opens the ledger of a run. Raises UserError where there is none, or where its rows are not what they were."""
    folder = Path(workdir).expanduser()
    if not (folder / FOLDER).is_dir():
        raise UserError(f"{folder}: holds no {FOLDER}; name the folder of a run that was trained with log.ledger=True (the default).")
    documents = read_documents(folder / FOLDER)
    exposures, parts = read_exposures(folder / FOLDER)
    if not len(exposures):
        raise UserError(f"{folder / FOLDER}: has no exposures yet; they are written with the first checkpoint of a run, and at its end.")
    config = read_run_config(folder)
    histories = make_histories(exposures, documents)
    if not len(histories):
        raise UserError(f"{folder / FOLDER}: no exposure has a finite loss over a supervised token; look at the log of the run.")
    rows = open_training_rows(config.data, documents, log)
    return OpenLedger(
        folder, config, documents, histories, rows, row_numbers(documents, rows.bases)[histories.document],
        tuple(_notes(histories, documents, parts)),
    )  # fmt: skip


def analyse(ledger: OpenLedger, *, column: str = "", set_name: str = "", limit: int = 10) -> Analysis:
    """Returns what a ledger says.

    Args:
        column: of rows, by whose values slices are made; dots lead into objects; "" makes none.
        set_name: only examples of this set are listed; "" lists those of all.
        limit: examples that are listed of each kind; 0 lists all.

    Raises UserError for a set or a column that is not there.
    """
    histories, documents = ledger.histories, ledger.documents
    names = [entry["name"] for entry in documents.sets]
    if set_name and set_name not in names:
        raise UserError(f"--set: there is no training set '{set_name}'; {did_you_mean(set_name, names)}.")
    prompts, answers, slice_of, slice_names, problems = _read_rows(ledger, column)
    set_of = documents.set[histories.document]
    results = {name: rule.find(histories, documents) for name, rule in RULES.items()}
    places = {name: found.places[np.argsort(-found.measure, kind="stable")] for name, found in results.items()}
    conflicts = find_conflicts(histories, ledger.row_of, prompts, answers)
    places[CONFLICT] = np.array([conflict.against for conflict in conflicts], np.int64)
    about = {**{name: rule.about for name, rule in RULES.items()}, CONFLICT: ABOUT_CONFLICTS}
    listed = lambda numbers: numbers[set_of[numbers] == names.index(set_name)] if set_name else numbers  # noqa: E731
    cut = lambda numbers: listed(numbers)[: limit or None].tolist()  # noqa: E731

    worst = cut(np.argsort(-histories.score, kind="stable"))
    shown = {name: cut(numbers) for name, numbers in places.items()}
    partners = {conflict.against: conflict for conflict in conflicts if conflict.against in shown[CONFLICT]}
    wanted = {*worst, *(place for numbers in shown.values() for place in numbers), *(c.places[0] for c in partners.values())}
    texts = ledger.rows.shown([int(ledger.row_of[place]) for place in wanted])

    def entry(place: int, detail: str) -> Entry:
        return _entry(ledger, place, detail, texts)

    kinds = {}
    for name, numbers in shown.items():
        describe = (lambda place: _conflict(ledger, partners[place], texts)) if name == CONFLICT else (lambda place: _course(histories, place))
        kinds[name] = Kind(about[name], len(listed(places[name])), tuple(entry(place, describe(place)) for place in numbers))
    sets = make_groups(histories, set_of, names, places)
    slices = make_groups(histories, slice_of[ledger.row_of], slice_names, places) if column else []
    if column and [group.name for group in slices] == [MISSING]:
        raise UserError(f"--slice: no row has a column '{column}'; fields of rows are such as {', '.join(ledger.rows.columns())}.")
    notes = [*ledger.notes, *([f"{problems:,} rows could not be read again, and were compared with none."] if problems else [])]
    return Analysis(
        str(ledger.folder), len(np.unique(histories.step)), len(histories.step), len(histories), len(documents) - len(histories),
        tuple(sets), tuple(sorted(slices, key=lambda group: -group.examples)), column, kinds,
        tuple(entry(place, _course(histories, place)) for place in worst), tuple(notes),
    )  # fmt: skip


def _read_rows(ledger: OpenLedger, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], int]:
    """Returns (keys of prompts, keys of answers, slices, names of slices, rows that cannot be read), by row."""
    count = len(ledger.rows)
    prompts, answers, slices = np.zeros(count, np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.int64)
    names: dict[str, int] = {}
    trained, problems = np.zeros(count, bool), 0
    trained[ledger.row_of] = True
    with Bar("reading rows", count) as bar:
        for row, facts in ledger.rows.facts(column, bar):
            prompts[row], answers[row] = facts.prompt, facts.answer
            if column and trained[row]:
                slices[row] = names.setdefault(facts.slice, len(names))
            problems += bool(facts.problem) and bool(trained[row])
    return prompts, answers, slices, list(names), problems


def _entry(ledger: OpenLedger, place: int, detail: str, texts: dict[int, tuple[str, str]]) -> Entry:
    histories, documents = ledger.histories, ledger.documents
    number, span = int(histories.document[place]), slice(*histories.begins[place : place + 2].tolist())
    prompt, answer = texts[int(ledger.row_of[place])]
    return Entry(
        documents.sets[documents.set[number]]["name"], printable(documents.files[documents.file[number]]), int(documents.line[number]),
        int(documents.turn[number]), float(histories.score[place]), tuple(histories.step[span].tolist()),
        tuple(histories.loss[span].tolist()), tuple(histories.accuracy[span].tolist()), detail, prompt, answer,
    )  # fmt: skip


def _course(histories: Histories, place: int) -> str:
    """Returns how the loss of an example went, beside what was usual at the end."""
    span = slice(*histories.begins[place : place + 2].tolist())
    loss = histories.loss[span]
    shown = [f"{value:.3f}" for value in loss]
    course = " ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-3:]])
    return f"loss {course}, where the median ends at {loss[-1] - histories.excess[span][-1]:.3f}"


def _conflict(ledger: OpenLedger, conflict: Conflict, texts: dict[int, tuple[str, str]]) -> str:
    """Returns with which row an example conflicts, and which one of them the model sides with."""
    histories, documents = ledger.histories, ledger.documents
    first, last = conflict.places[0], conflict.against
    more = f", {len(conflict.places) - 2} more rows" if len(conflict.places) > 2 else ""
    other = printable(documents.where(int(histories.document[first])))
    losses = (float(histories.loss[histories.begins[place + 1] - 1]) for place in (last, first))
    return "loss {:.3f}, and {:.3f} of the same prompt in {} with {}{}".format(*losses, other, texts[int(ledger.row_of[first])][1], more)


def _notes(histories: Histories, documents: Documents, parts: list[tuple[int, int]]) -> list[str]:
    """Returns what the ledger does not have, and why."""
    notes = []
    if histories.left_out:
        notes.append(f"{histories.left_out:,} exposures are of steps that were left out, since they were not finite, and count nowhere.")
    if histories.unsupervised:
        notes.append(f"{histories.unsupervised:,} exposures had no supervised token and count nowhere.")
    missing = sum(first - last - 1 for (_, last), (first, _) in zip([(0, 0), *parts], parts, strict=False))
    if missing:
        notes.append(f"{missing:,} steps were trained with log.ledger=False, and what they saw is not known.")
    exposures = np.bincount(documents.set[np.repeat(histories.document, histories.counts)], minlength=len(documents.sets))
    for entry, count in zip(documents.sets, exposures.tolist(), strict=True):
        if 0 < count < LEAST:
            notes.append(f"{entry['name']} came up {count:,} times in all, so its losses are compared over the whole run and not by time.")
    if histories.counts.max() < 2:
        notes.append(
            "Every example came up once, before it was trained on, so nothing can be said of what was learnt of it (never_learnt, "
            "forgotten, learnt_late); train for two epochs or more."
        )
    return notes


def read_run_config(folder: Path) -> Config:
    """Returns the configuration that a run was last started with. Raises UserError naming the file."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name the folder of a run, and restore the file.") from error
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise UserError(f"{path}: is not the configuration of a run; restore it from a copy.")
    return parse_config(values)
