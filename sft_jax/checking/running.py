"""Contracts of a run as a whole: what it leaves on disk is what it computed, wherever it was stopped."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.checking.outcome import Outcome
from sft_jax.checking.subject import Subject
from sft_jax.checkpoint.checkpoints import DamagedCheckpoint, committed_steps, read_manifest, verify
from sft_jax.config import Config
from sft_jax.errors import StoppedAsConfigured
from sft_jax.hf.load import load_decoder
from sft_jax.hf.source import ADAPTER, EXPORT
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn
from sft_jax.training import contracts
from sft_jax.training.run import fit
from sft_jax.training.signals import StopSignal
from sft_jax.training.state import create_state
from sft_jax.training.step import make_train_step, place_batch

_STEPS = 4  # of the runs that are compared
_OVERFIT = 100  # steps at most on one batch
_HALF = 0.5  # what its loss must fall to, of what it was


@dataclasses.dataclass
class Runs:
    """Two short runs of the user's own configuration: one in a piece, one that was stopped in the middle."""

    whole: Path
    stopped: Path


def make_runs(subject: Subject, folder: Path) -> Runs:
    """Trains twice for a few steps; what the runs print is left beside their folders. Raises StoppedBySignal where the user ends them."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(folder / "whole", folder / "stopped")
    config = short(subject.run, export=True)
    with StopSignal() as stop:  # beside it each run has one of its own, which passes on what comes too late for it
        stop.where = "between the short runs"
        with _told_to(folder / "whole.txt"):
            fit(config, runs.whole)
        with _told_to(folder / "stopped.txt"):
            with contextlib.suppress(StoppedAsConfigured):  # a signal of the user ends the check
                fit(dataclasses.replace(config, train=dataclasses.replace(config.train, stop_after_steps=_STEPS // 2)), runs.stopped)
            fit(config, runs.stopped)
    return runs


def short(config: Config, export: bool) -> Config:
    """Returns the configuration of a run of a few steps that evaluates nothing and reports to nobody."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, eval=()),
        train=dataclasses.replace(config.train, steps=_STEPS, stop_after_steps=0, profile=0, export=export and config.train.export),
        checkpoint=dataclasses.replace(config.checkpoint, every=0, save_last=True),
        log=dataclasses.replace(config.log, every=1, wandb=""),
    )


def resume(runs: Runs) -> Outcome:
    """A run that was stopped and started again saves, bit for bit, what one that was never stopped does, and logs the same."""
    arrays = [_manifest(run)["arrays"] for run in (runs.whole, runs.stopped)]
    logs = [_losses(run) for run in (runs.whole, runs.stopped)]
    differing = [name for name in arrays[0] if arrays[1].get(name) != arrays[0][name]] + [name for name in arrays[1] if name not in arrays[0]]
    steps = [a["step"] for a, b in zip(*logs, strict=True) if a != b] if len(logs[0]) == len(logs[1]) else ["their number"]
    what = f"arrays and steps that differ{': ' + ', '.join(map(str, (differing + steps)[:3])) if differing + steps else ''}"
    return Outcome("resume", what, float(len(differing) + len(steps)), 0.0)


def integrity(runs: Runs) -> Outcome:
    """A checkpoint in which a bit has been flipped is noticed. It is flipped back."""
    folder = _newest(runs.stopped)
    unnoticed = []
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    largest = max(files, key=lambda path: path.stat().st_size)
    for path in {largest, files[0], files[-1]}:
        with open(path, "r+b") as file:
            place = path.stat().st_size // 2
            file.seek(place)
            byte = file.read(1)
            _write(file, place, bytes([byte[0] ^ 1]))
            try:
                verify(folder)
                unnoticed.append(path.name)
            except (DamagedCheckpoint, ValueError):
                pass
            finally:
                _write(file, place, byte)
    return Outcome("integrity", "flipped bits that nothing noticed", float(len(unnoticed)), 0.0)


def export(subject: Subject, runs: Runs) -> Outcome:
    """What was exported, read again, has the loss of every token that the newest checkpoint has, rounded as the export is."""
    folder = next((runs.whole / name for name in (ADAPTER, EXPORT) if (runs.whole / name).is_dir()), None)
    if folder is None:
        return Outcome("export", not_checked="the run writes none (train.export)")
    options = Options(constrain=constrain_fn(subject.mesh))
    trained, exported = (load_decoder(path, options, subject.mesh) for path in (runs.whole, folder))
    if folder.name == EXPORT:
        dtypes = {name: x.dtype for name, x in _named(exported)}
        trained = _rounded(trained, dtypes)
    ours, theirs = (contracts.token_losses(decoder, subject.batch, subject.mesh) for decoder in (trained, exported))
    return Outcome("export", "loss of a token", float((np.abs(ours - theirs) / np.maximum(ours, 1)).max(initial=0)), 1e-5)


def overfitting(subject: Subject, steps: int = _OVERFIT) -> Outcome:
    """The run's own optimizer, at its highest learning rate, halves the loss of one batch."""
    optim = dataclasses.replace(subject.run.optim, schedule="constant", warmup=0.0)
    composed = dataclasses.replace(subject.composed, config=dataclasses.replace(subject.config, optim=optim))
    optimizer = composed.optimizer(steps)
    graphdef, state = create_state(jax.tree.map(jnp.copy, subject.decoder), optimizer, subject.mesh)
    step = make_train_step(graphdef, optimizer, subject.mesh, subject.config.loss)
    batch = place_batch(jax.tree.map(lambda x: x[None], subject.batch), subject.mesh, batch_dim=1)
    first = last = math.nan
    for number in range(steps):
        state, metrics = step(state, batch)
        last = float(metrics["loss_sum"] / metrics["weight"])
        first = last if number == 0 else first
        if not last > _HALF * first:  # also where it is not finite
            break
    hint = "" if last <= _HALF * first else (
        f"from {first:.3f} to {last:.3f} in {steps} steps: is the learning rate ({subject.run.optim.learning_rate:g}) far too low or far too "
        "high, is little trained (optim.groups, adapter.targets), are the answers noise?"
    )  # fmt: skip
    return Outcome("overfitting", f"share of the loss of a batch left after {number + 1} steps on it", last / first, _HALF, hint=hint)


def _named(decoder) -> list[tuple[str, jax.Array]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(decoder)]


def _rounded(decoder, dtypes: dict[str, jnp.dtype]):
    """Returns the decoder with each array rounded to the dtype that it has in an export, and computed in that."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.astype(dtypes[jax.tree_util.keystr(path)]), decoder)


def _newest(run: Path) -> Path:
    folder = run / "checkpoints"
    return folder / str(max(committed_steps(folder)))


def _manifest(run: Path) -> dict:
    return read_manifest(_newest(run))


def _losses(run: Path) -> list[dict]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in ("step", "loss", "grad_norm") if name in line} for line in lines]


def _write(file: io.BufferedRandom, place: int, data: bytes) -> None:
    file.seek(place)
    file.write(data)
    file.flush()


@contextlib.contextmanager
def _told_to(path: Path):
    """Sends what a run prints to a file."""
    with open(path, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
