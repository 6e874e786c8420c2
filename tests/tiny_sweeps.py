"""A tiny recipe for experiments, and calls that stop or count what they make."""

import os
import signal
from pathlib import Path

from tiny_run import tiny_config

STEPS = 3


def tiny_changes(folder: Path) -> dict:
    """Returns what a tiny run of an experiment changes of `tiny_config`."""
    tiny_config(folder)  # makes the files
    return {"data__eval": {"held_out": str(folder / "held_out.jsonl")}, "data__date": "2026-01-31", "train__steps": STEPS, "checkpoint__every": 0}


def tiny_recipe(folder: Path, **changes) -> dict:
    """Returns the recipe of a tiny run as `cli.read_raw_config` gives it."""
    return tiny_config(folder, **tiny_changes(folder) | changes).to_dict()


def killed_on(text: str, lines: list[str], times: int = 1):
    """Returns a log that keeps its lines and gets SIGTERM with the `times`-th line that has `text`."""

    def log(line: str) -> None:
        lines.append(line)
        if text in line and sum(text in earlier for earlier in lines) == times:
            os.kill(os.getpid(), signal.SIGTERM)

    return log
