"""Runs of the model of the quickstart for tests of the report: sound ones that were trained, and copies with a fault planted."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
from rich.console import Console
from tiny_run import ROOT, run_command

from sft_jax.config import default_config
from sft_jax.diagnosis.terminal import report_text


def rows_of(name: str, count: int) -> list[dict]:
    """The first rows of a file of the quickstart."""
    return [json.loads(line) for line in (ROOT / "data/quickstart" / name).read_text().splitlines()[:count]]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def quickstart(folder: Path, **changes):
    """The configuration of a quickstart of some seconds; `changes` as section__key."""
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl", rows_of("train.jsonl", 500))
        write_rows(folder / "held_out.jsonl", rows_of("held_out.jsonl", 24))
    config = default_config()
    config.model.path = str(ROOT / "models/nano")
    config.model.compute_dtype, config.model.remat = "float32", "none"
    config.data.train, config.data.eval = str(folder / "train.jsonl"), {"held_out": str(folder / "held_out.jsonl")}
    config.data.max_length, config.data.workers, config.data.cache_dir = 128, 1, str(folder / "cache")
    config.train.epochs, config.train.batch_size = 3.0, 4
    config.optim.learning_rate, config.optim.b2 = 2e-3, 0.98
    config.eval.generate, config.eval.max_new_tokens, config.eval.batch_size = 12, 48, 12
    config.checkpoint.every, config.log.every, config.log.tensorboard = 0, 4, False
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def train(folder: Path, name: str, **changes) -> Path:
    """Trains in a process of its own, with one device, and returns the folder of the run."""
    done = run_command(quickstart(folder, **changes), folder / name, folder / "compiled")
    assert done.returncode == 0, done.stderr
    return folder / name


def planted(run: Path, to: Path, *, checkpoints: bool = False) -> Path:
    """Returns a copy of a run."""
    shutil.copytree(run, to, ignore=None if checkpoints else shutil.ignore_patterns("checkpoints"))
    return to


def edit_json(path: Path, change) -> None:
    """Changes a JSON file of a run as the run writes it."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def edit_lines(path: Path, change) -> None:
    """Gives `change` each record of a log, in order, to be changed in place."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def noise(step: int, size: float) -> float:
    """A deviation that depends on the step alone."""
    return size * float(np.random.default_rng(step).normal())


def said(report) -> str:
    """A report as it is written in a terminal."""
    console = Console(width=1000, file=io.StringIO())
    console.print(report_text(report))
    return console.file.getvalue()
