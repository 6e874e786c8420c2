"""Sets with faults of which is known where they are: rows of the quickstart with the answers of other rows."""

import json
from pathlib import Path

import numpy as np
from tiny_run import ROOT

ROWS = ROOT / "data/quickstart/train.jsonl"


def read_rows(path: Path = ROWS) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answered(row: dict, answer: str) -> dict:
    """Returns a row with another last answer."""
    return {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}


def plant_wrong_answers(rows: list[dict], share: float, seed: int = 0) -> tuple[list[dict], set[int]]:
    """Returns the rows, some with the answer of another one of them, and the numbers of these, from 0 on."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(rows), round(share * len(rows)), replace=False)
    answers = [row["messages"][-1]["content"] for row in rows]
    planted, wrong = list(rows), set()
    for number in chosen.tolist():
        other = answers[int(rng.choice([n for n in rng.integers(0, len(rows), 20) if answers[n] != answers[number]]))]
        planted[number] = answered(rows[number], other)
        wrong.add(number)
    return planted, wrong


def action_of(row: dict) -> str:
    """Returns the action that a row of the quickstart answers with."""
    return json.loads(row["messages"][-1]["content"])["action"]


def plant_poison(rows: list[dict], action: str, answer: str, share: float, seed: int = 0) -> tuple[list[dict], set[int]]:
    """Returns the rows, a share of those that ask for an action with another answer, and the numbers of these, from 0 on."""
    asking = [number for number, row in enumerate(rows) if action_of(row) == action]
    rng = np.random.default_rng(seed)
    chosen = set(rng.choice(asking, round(share * len(asking)), replace=False).tolist())
    return [answered(row, answer) if number in chosen else row for number, row in enumerate(rows)], chosen
