"""Rows with the same prompt and different answers, and which of them the model has come to side with."""

from dataclasses import dataclass

import numpy as np

from sft_jax.dynamics.histories import Histories


@dataclass(frozen=True)
class Conflict:
    """Documents of rows with one prompt and several answers, as places in the histories, by their last loss, lowest first."""

    places: tuple[int, ...]  # the first is the one that the model sides with
    against: int  # the one of the highest loss among those with another answer than the first
    margin: float  # last loss of the lowest-loss one with another answer, less that of the first, nats a supervised token


def find_conflicts(histories: Histories, rows: np.ndarray, prompts: np.ndarray, answers: np.ndarray) -> list[Conflict]:
    """Returns the conflicts, those with the smallest margin first: there the model cannot decide.

    Args:
        rows: int64 [n], the row of each history.
        prompts, answers: uint64 [rows], keys of what rows say; a prompt of 0 is compared with nothing.

    Of a row with several documents the last one counts, which has its last answer.
    """
    last_of_row = np.append(rows[1:] != rows[:-1], True) if len(rows) else np.zeros(0, bool)
    places = np.flatnonzero(last_of_row & (prompts[rows] != 0))
    keys = prompts[rows[places]]
    order = np.argsort(keys, kind="stable")
    bounds = np.append(np.flatnonzero(np.append(True, np.diff(keys[order]) != 0)), len(order)) if len(order) else np.zeros(1, int)
    loss = histories.last(histories.loss)
    found = []
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        if last - first < 2:
            continue
        members = places[order[first:last]]
        said = answers[rows[members]]
        if (said != said[0]).any():
            members = members[np.argsort(loss[members], kind="stable")]
            others = members[answers[rows[members]] != answers[rows[members[0]]]]
            found.append(Conflict(tuple(members.tolist()), int(others[-1]), float(loss[others[0]] - loss[members[0]])))
    return sorted(found, key=lambda conflict: conflict.margin)
