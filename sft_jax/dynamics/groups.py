"""Numbers of a group of examples: a data set, or the rows with one value of a column."""

from typing import Any, NamedTuple

import numpy as np

from sft_jax.dynamics.histories import Histories


class Group(NamedTuple):
    """How a group was learnt. Losses are over supervised tokens, so long answers count more, as in the log of a run."""

    name: str
    examples: int  # documents that came up
    exposures: int
    first_loss: float  # nats a supervised token, over the first exposures
    last_loss: float
    last_accuracy: float  # share of supervised tokens that are the argmax, over the last exposures
    learnt: int  # examples of which all are, at the last exposure
    found: dict[str, int]  # kind of finding -> examples

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def make_groups(histories: Histories, group_of: np.ndarray, names: list[str], found: dict[str, np.ndarray]) -> list[Group]:
    """Returns the numbers of all groups that have examples.

    Args:
        group_of: int [n], the group of each history, a number of `names`.
        found: kind of finding -> places in the histories.
    """
    count = len(names)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(group_of, values, minlength=count)

    first_weight, last_weight = histories.first(histories.weight), histories.last(histories.weight)
    first_loss, last_loss = histories.first(histories.loss) * first_weight, histories.last(histories.loss) * last_weight
    accuracy = histories.last(histories.accuracy)
    sums = [total(values) for values in (np.ones(len(histories)), histories.counts, accuracy == 1)]
    sums += [total(first_loss) / np.maximum(total(first_weight), 1e-30), total(last_loss) / np.maximum(total(last_weight), 1e-30)]
    sums.append(total(accuracy * last_weight) / np.maximum(total(last_weight), 1e-30))
    faults = {kind: np.bincount(group_of[places], minlength=count) for kind, places in found.items()}
    groups = []
    for number, name in enumerate(names):
        examples, exposures, learnt, first, last, right = (float(values[number]) for values in sums)
        if examples:
            counts = {kind: int(values[number]) for kind, values in faults.items()}
            groups.append(Group(name, int(examples), int(exposures), first, last, right, int(learnt), counts))
    return groups
