"""Influence on a run: its newest state, its data, the held-out examples that it fails at, and the training examples behind them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.config import Config, DataSetConfig
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.prepare import PreparedData, prepare
from sft_jax.dynamics.analysis import OpenLedger
from sft_jax.dynamics.bar import Bar
from sft_jax.dynamics.row_texts import RunRows, row_numbers
from sft_jax.errors import UserError, did_you_mean
from sft_jax.hf.load import load_decoder
from sft_jax.hf.merged import plain
from sft_jax.hf.progress import LoadProgress
from sft_jax.hf.restore import sound_checkpoint
from sft_jax.influence.scores import Losses, choose_failing, document_losses, influence_scores
from sft_jax.model.families import spec_from_config
from sft_jax.model.options import Options
from sft_jax.printable import printable
from sft_jax.training.adapting import tokenizer_place

Log = Callable[[str], None]


@dataclass(frozen=True)
class Failing:
    """A held-out example that the model fails at."""

    set: str
    file: str
    line: int
    turn: int
    loss: float  # nats a supervised token
    accuracy: float  # share of supervised tokens that are the argmax
    prompt: str
    answer: str


@dataclass(frozen=True)
class Influencing:
    """A training example and its influence."""

    set: str
    file: str
    line: int
    turn: int
    influence: float  # mean cosine with the gradients of the failing examples; below 0: training on it raises their loss
    prompt: str
    answer: str


@dataclass(frozen=True)
class Influence:
    """What influence on a run was found."""

    step: int  # of the checkpoint
    looked_at: int  # held-out examples among which failing ones were looked for
    failing: tuple[Failing, ...]  # highest loss first
    harmful: tuple[Influencing, ...]  # most harmful first
    helpful: tuple[Influencing, ...]  # most helpful first
    scores: np.ndarray  # [documents], of all training documents
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all but the scores of the rest as plain lists and dicts."""
        lists = {name: [vars(entry) for entry in getattr(self, name)] for name in ("failing", "harmful", "helpful")}
        return {"step": self.step, "looked_at": self.looked_at, **lists, "notes": list(self.notes)}


def find_influence(
    ledger: OpenLedger, *, set_name: str = "", where: str = "", failing: int = 32, limit: int = 10, seed: int = 0, log: Log
) -> Influence:
    """Returns the training examples of a run that pull it away from, and towards, held-out ones that it fails at.

    Args:
        set_name: the set of data.eval in which failing examples are looked for; "" takes all.
        where: "COLUMN=VALUE": only among rows of data.eval with this value, as `--slice` names it; "" takes all.
        failing: so many failing examples are looked at, at most, those with the highest loss.
        limit: training examples that are listed at either end; 0 lists all.
        seed: of the random projection.

    Raises UserError where the run has no held-out data or no checkpoint, where nothing is chosen, and where nothing fails.
    """
    config = ledger.config
    chosen = _chosen_sets(config, set_name)
    folder = ledger.folder
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: has no checkpoint, of which gradients could be taken; train with checkpoint.save_last=True (the default).")
    checkpoint, manifest = sound_checkpoint(folder)
    data = _prepare(config, manifest, log)
    if data.train.plan_hash != ledger.documents.plan_hash:
        raise UserError(f"{folder}: its data are not those that it was trained on; restore the data files, the template and the tokenizer.")
    held_out = {item.name: RunRows(config.data, "eval", [item], log) for item in chosen}
    options = Options(compute_dtype=config.model.compute_dtype, precision=config.model.matmul_precision, remat=config.model.remat)
    with LoadProgress(str(folder)) as loaded:
        decoder = plain(load_decoder(folder, options, progress=loaded))

    found: list[tuple[float, str, int]] = []  # loss, set, document
    losses: dict[str, Losses] = {}
    looked_at = 0
    for name, rows in held_out.items():
        stream = data.eval[name]
        allowed_row = _allowed(rows, where)
        with Bar(f"loss of {name}", stream.total_rows) as bar:
            losses[name] = document_losses(decoder, stream, bar)
        allowed = allowed_row[_row_of(stream)[losses[name].document]]
        looked_at += int(allowed.sum())
        for number in choose_failing(losses[name], allowed, failing).tolist():
            found.append((float(losses[name].loss[losses[name].place(number)]), name, number))
    if not looked_at:
        raise UserError(f"--influence_where: no row of data.eval has {where}; see the values of a column with inspect_data --json.")
    found = sorted(found, key=lambda item: -item[0])[:failing]
    if not found:
        raise UserError(
            f"--influence: the run answers all {looked_at:,} held-out examples right, token by token, so there is nothing to look for; name "
            "examples that it fails at with data.eval."
        )
    targets = [(data.eval[name], np.array([number for _, of, number in found if of == name], np.int64)) for name in held_out]
    with Bar("gradients of training examples", data.train.document_count) as bar:
        scores = influence_scores(decoder, data.train, [target for target in targets if len(target[1])], seed, bar)

    finite = np.flatnonzero(np.isfinite(scores))
    order = finite[np.argsort(scores[finite], kind="stable")]
    harmful, helpful = order[scores[order] < 0][: limit or None], order[::-1][scores[order[::-1]] > 0][: limit or None]
    without = len(scores) - len(finite)
    return Influence(
        manifest["step"], looked_at, tuple(_failing(data, losses, held_out, found)), tuple(_influencing(ledger, scores, harmful)),
        tuple(_influencing(ledger, scores, helpful)), scores,
        (f"{without:,} training examples have no gradient, or none that is finite, and were left out.",) if without else (),
    )  # fmt: skip


def _chosen_sets(config: Config, set_name: str) -> list[DataSetConfig]:
    sets = list(config.data.eval)
    if not sets:
        raise UserError("--influence: this run has no held-out data; train with data.eval, since influence is on examples that it fails at.")
    names = [item.name for item in sets]
    if set_name and set_name not in names:
        raise UserError(f"--influence_set: there is no held-out set '{set_name}'; {did_you_mean(set_name, names)}.")
    return [item for item in sets if not set_name or item.name == set_name]


def _prepare(config: Config, manifest: dict[str, Any], log: Log) -> PreparedData:
    """Returns the data of the run, as it prepared them."""
    vocab_size = spec_from_config(json.loads(manifest["model_config"])).vocab_size
    return prepare(
        config.data, model_path=str(tokenizer_place(config)), vocab_size=vocab_size, seed=config.seed, epochs=config.train.epochs,
        rows=config.train.steps * config.train.batch_size, normalize=config.train.normalize, rendered_at=manifest["rendered_at"],
        log=log,
    )  # fmt: skip


def _allowed(rows: RunRows, where: str) -> np.ndarray:
    """Returns bool [rows], which rows have the value that `where` asks for."""
    column, equals, value = where.partition("=")
    if where and not (column and equals):
        raise UserError(f"--influence_where: must be COLUMN=VALUE, such as topic=lights, not '{where}'.")
    allowed = np.ones(len(rows), bool)
    if where:
        for row, facts in rows.facts(column):
            allowed[row] = facts.slice == value
    return allowed


def _row_of(stream: RowStream) -> np.ndarray:
    """Returns int64 [documents], the row of each document of a stream of one set."""
    return stream.corpus.stores[0].rows.whole()[stream.documents.example]


def _failing(
    data: PreparedData, losses: dict[str, Losses], held_out: dict[str, RunRows], found: list[tuple[float, str, int]]
) -> list[Failing]:
    texts = {
        name: rows.shown([int(_row_of(data.eval[name])[number]) for _, of, number in found if of == name])
        for name, rows in held_out.items()
    }
    entries = []
    for loss, name, number in found:
        stream = data.eval[name]
        _, file, line, turn = stream.identity(int(stream.documents.example[number]))
        accuracy = float(losses[name].accuracy[losses[name].place(number)])
        shown = texts[name][int(_row_of(stream)[number])]
        entries.append(Failing(name, printable(file), int(line), int(turn), loss, accuracy, *shown))
    return entries


def _influencing(ledger: OpenLedger, scores: np.ndarray, numbers: np.ndarray) -> list[Influencing]:
    documents = ledger.documents
    row_of = row_numbers(documents, ledger.rows.bases)
    texts = ledger.rows.shown([int(row_of[number]) for number in numbers])
    return [
        Influencing(
            documents.sets[documents.set[number]]["name"], printable(documents.files[documents.file[number]]), int(documents.line[number]),
            int(documents.turn[number]), float(scores[number]), *texts[int(row_of[number])],
        )
        for number in numbers.tolist()
    ]  # fmt: skip
