"""The likelihood of given continuations: what choosing between answers, and benchmarks, are made of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sft_jax.batch import empty_batch
from sft_jax.evaluation.decoding import round_up
from sft_jax.evaluation.losses import place_rows
from sft_jax.evaluation.step import EvalStep
from sft_jax.model.sharding import pieces_along


class Likelihood(NamedTuple):
    """Of a continuation."""

    log_likelihood: float  # nats, of all its tokens
    greedy: bool  # each of its tokens is the most probable one


def likelihoods(
    eval_step: EvalStep,
    state: Any,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    mesh: Mesh | None = None,
    between: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """Returns the likelihood of every continuation, in the order given.

    Args:
        eval_step: see `sft_jax.evaluation.step.EvalStep`.
        sequences: (context, continuation) as ids, neither empty; sequences of about the same length are read together.
        batch_size: sequences that are read together, rounded up to a multiple of the devices that rows are split over.
        between: called after each batch with the number of sequences that are done.
    """
    groups = pieces_along(mesh, "batch") if mesh is not None else 1
    rows = -(-min(batch_size, max(len(sequences), 1)) // groups) * groups
    order = sorted(range(len(sequences)), key=lambda index: -sum(map(len, sequences[index])))
    found: list[Likelihood | None] = [None] * len(sequences)
    for first in range(0, len(order), rows):
        group = order[first : first + rows]
        batch = empty_batch(rows, round_up(sum(map(len, sequences[group[0]])) - 1), 1)
        for row, index in enumerate(group):
            context, continuation = sequences[index]
            if not len(context) or not len(continuation):
                raise ValueError("a context or a continuation has no tokens")
            ids = np.array([*context, *continuation], np.int32)
            size = len(ids) - 1
            batch.tokens[row, :size], batch.targets[row, :size] = ids[:-1], ids[1:]
            batch.weights[row, len(context) - 1 : size] = 1
            batch.segments[row, :size], batch.positions[row, :size] = 1, np.arange(size)
            batch.examples[row, 0] = index
        read = lambda start, count, batch=batch: jax.tree.map(lambda x: x[start : start + count], batch)  # noqa: E731
        sums = eval_step(state, batch if mesh is None else place_rows(read, 0, rows, mesh))
        parts = (part[: len(group), 0].tolist() for part in jax.device_get(sums))
        for index, nll, weight, correct in zip(group, *parts, strict=True):
            found[index] = Likelihood(-nll, correct == weight)
        between(first + len(group))
    return found
