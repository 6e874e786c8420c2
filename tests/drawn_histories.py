"""Documents and exposures whose losses are drawn by the test."""

import numpy as np

from sft_jax.dynamics.parts import Documents, Exposures

BATCH = 50  # documents in a step


def documents_of(count: int, supervised=None, sets=None) -> Documents:
    zeros = np.zeros(count, np.int32)
    supervised = np.full(count, 10) if supervised is None else supervised
    sets = zeros if sets is None else sets
    lines = np.arange(count)
    return Documents(sets, zeros, lines + 1, lines, zeros - 1, zeros, supervised, ({"name": "train"},), ("train.jsonl",), "")


def exposures_of(losses: np.ndarray, accuracy: np.ndarray, weight, seed: int = 0) -> Exposures:
    """Each epoch in an order of its own; `losses` and `accuracy` are [documents, epochs]."""
    rng, parts = np.random.default_rng(seed), []
    for epoch in range(losses.shape[1]):
        order = rng.permutation(len(losses))
        steps = epoch * (len(losses) // BATCH) + np.arange(len(losses)) // BATCH + 1
        w = np.broadcast_to(weight, len(losses))[order].astype(np.float32)
        loss, correct = ((values[order, epoch] * w).astype(np.float32) for values in (losses, accuracy))
        parts.append(Exposures(steps.astype(np.int32), order.astype(np.int32), loss, w, correct))
    return Exposures.concatenate(parts)
