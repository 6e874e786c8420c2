"""The runs of an experiment: their names, their configurations, and that what lies in their folders is of these."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_jax.config import Config, to_dict
from sft_jax.config_parsing import overridden, parse_config
from sft_jax.errors import UserError
from sft_jax.experiments.overrides import Overrides
from sft_jax.training.resolved import resolved
from sft_jax.training.resume import differences
from sft_jax.training.workdir import Workdir

RUNS = "runs"  # folder of the experiment that has a folder for each run
FAILED = "failed.json"  # in a run's folder: why it failed

_LONGEST = 100  # characters of a name
# Keys that change no number of a run, so that they may differ between the starts of an experiment.
_FREE = ("log", "data.cache_dir", "data.workers", "data.row_timeout", "data.row_memory_mb", "checkpoint.allow_changes", "train.hang_seconds")


@dataclass(frozen=True)
class Run:
    """A run of an experiment."""

    name: str  # of its folder
    point: str  # what it is a run of, beside the seed, for people
    config: Config
    labels: Overrides  # what it differs in from the recipe, beside the seed

    @property
    def seed(self) -> int:
        return self.config.seed


def make_runs(raw: dict[str, Any], points: Sequence[Overrides], seeds: Sequence[int]) -> list[Run]:
    """Returns the runs of every point with every seed, in this order.

    Args:
        raw: The recipe, as `cli.read_raw_config` gives it.
        points: Keys and values that change; their own `seed`, where they have one, wins over `seeds`.

    Raises UserError for a value that a key does not take, and for two runs that would be the same.
    """
    short = _short_names([key for point in points for key in point])
    runs: list[Run] = []
    for point in points:
        labels = {key: value for key, value in point.items() if key != "seed"}
        told = " ".join(f"{short[key]}={_shown(value)}" for key, value in labels.items()) or "recipe"
        for seed in [point["seed"]] if "seed" in point else seeds:
            config = parse_config(overridden(raw, {**point, "seed": seed}))
            check_whole(config)
            run = Run(file_name(f"{told} seed={seed}"), told, config, labels)
            same = next((other.name for other in runs if other.config == config or other.name == run.name), None)
            if same is not None:
                raise UserError(f"{run.name}: is there twice ({same}); leave one of the two out.")
            runs.append(run)
    return runs


def check_whole(config: Config) -> None:
    """Raises UserError for a configuration whose runs would not end."""
    if config.train.stop_after_steps:
        raise UserError("train.stop_after_steps: would leave every run unfinished; leave it out.")


def file_name(text: str) -> str:
    """Returns a text as the name of a folder; where it cannot stand there as it is, the end of it is a hash of the whole.

    >>> file_name("learning_rate=1e-05 rank=8 seed=0")
    'learning_rate=1e-05_rank=8_seed=0'
    """
    plain = text.replace(" ", "_")
    name = re.sub(r"[^A-Za-z0-9.,=+_-]+", "-", plain)
    if name == plain and len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def shown_path(path: Path) -> str:
    """Returns a path as short as it can be from where the command was started."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def check_folders(runs: Sequence[Run], work: Workdir) -> None:
    """Raises UserError where the folder of a run holds one with another configuration."""
    for run in runs:
        before = _config_of(work.path / RUNS / run.name)
        changed = changes(before, run) if before else []
        if changed:
            key, old, new = changed[0]
            folder = shown_path(work.path / RUNS / run.name)
            raise UserError(f"{key}: was {old!r} when {folder} was run and is {new!r} now. Set it back, or use another --workdir.")


def changes(before: dict[str, Any], run: Run) -> list[tuple[str, Any, Any]]:
    """Returns (key, old, new) of what decides numbers and differs between the recorded configuration `before` and a run's."""
    return [
        change for change in differences(before, to_dict(resolved(run.config)))
        if not any(change[0] == key or change[0].startswith(f"{key}.") for key in _FREE)
    ]  # fmt: skip


def _config_of(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}). Restore it, or remove the folder of the run.") from error


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Returns the last part of each key, or the whole key where another one ends so.

    >>> _short_names(["optim.name", "adapter.name", "adapter.rank"])
    {'optim.name': 'optim.name', 'adapter.name': 'adapter.name', 'adapter.rank': 'rank'}
    """
    ends = Counter(key.rpartition(".")[2] for key in dict.fromkeys(keys))
    return {key: key.rpartition(".")[2] if ends[key.rpartition(".")[2]] == 1 else key for key in dict.fromkeys(keys)}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
