"""How the answers of a model are by themselves: whether they end, how long they are, whether they repeat themselves."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

_RUN = 12  # characters of a run that is looked for again; of characters, so that no language needs words
_SHORTEST = 5 * _RUN  # characters below which an answer is not judged
_NEW = 0.5  # share of distinct runs below which an answer repeats itself; that of prose is above 0.9


class Health(NamedTuple):
    """Of the answers to the prompts of a held-out set at one step."""

    step: int
    answers: int
    ended: float  # share that the model ended itself
    length: float  # median characters
    reference_length: float  # median characters of the references
    repeating: float  # share of answers in which most runs of 12 characters were there before
    empty: float  # share of answers without a text

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def health_of(samples: Iterable[Mapping[str, Any]], last: bool = True) -> dict[str, Health]:
    """Returns the health of the last answers of each set in records of samples.jsonl, or of the first ones."""
    by_set: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for sample in samples:
        by_set.setdefault(str(sample["set"]), {}).setdefault(sample["step"], []).append(sample)
    return {name: _health(max(steps) if last else min(steps), steps[max(steps) if last else min(steps)]) for name, steps in by_set.items()}


def repeats(text: str) -> bool:
    """Returns whether most of a text was there before in it.

    >>> repeats("and so on " * 20), repeats("Timers run in the kitchen; lights are in every other room of this house.")
    (True, False)
    """
    if len(text) < _SHORTEST:
        return False
    runs = [text[place : place + _RUN] for place in range(len(text) - _RUN + 1)]
    return len(set(runs)) < _NEW * len(runs)


def _health(step: int, samples: list[Mapping[str, Any]]) -> Health:
    answers = [str(sample["generation"]) for sample in samples]
    return Health(
        step, len(answers), float(np.mean([bool(sample.get("finished")) for sample in samples])),
        float(np.median([len(answer) for answer in answers])), float(np.median([len(str(sample.get("reference", ""))) for sample in samples])),
        float(np.mean([repeats(answer) for answer in answers])), float(np.mean([not answer.strip() for answer in answers])),
    )  # fmt: skip
