"""Influence: which training documents pull the model away from held-out ones that it fails at.

A step on a training document with gradient g changes the loss of a held-out one with gradient h by -rate * <g, h>, to first order
(TracIn, Pruthi et al. 2020, arXiv:2002.08484). So a negative inner product is harm. Gradients are made unit vectors first, as LESS does
(Xia et al. 2024, arXiv:2402.04333, section 4.1): else short answers, whose gradients are long, would come first at both ends. One
state of the model is looked at, the newest checkpoint, where a held-out document that fails has a gradient that says what is missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from sft_jax.data.packing.pipeline import RowStream
from sft_jax.dynamics.parts import placed
from sft_jax.influence.gradients import make_gradients
from sft_jax.influence.unpacked import unpacked_batches
from sft_jax.model.decoder import Decoder
from sft_jax.model.loss import LossSum, next_token_loss

TOKENS = 2048  # positions of a batch on each device

Note = Callable[[int], None]


@dataclass(frozen=True)
class Losses:
    """Of the documents of a stream, each by itself."""

    document: np.ndarray  # int64 [n], ascending
    loss: np.ndarray  # float64 [n], nats a supervised token
    accuracy: np.ndarray  # float64 [n], share of supervised tokens that are the argmax

    def place(self, document: int) -> int:
        """Returns the place of a document in the arrays."""
        return int(np.searchsorted(self.document, document))


def document_losses(decoder: Decoder, stream: RowStream, note: Note = lambda rows: None) -> Losses:
    """Returns the loss of every document of a stream, whose rows come once; `note` counts rows."""
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def evaluate(state: nnx.State, batch) -> LossSum:
        return next_token_loss(nnx.merge(graphdef, state), batch)

    rows, found = max(TOKENS // stream.max_length, 1), []
    for first in range(0, stream.total_rows, rows):
        last = min(first + rows, stream.total_rows)
        sums = jax.device_get(evaluate(state, stream.read(first, rows)))
        found.append(placed(stream, first, last, sums.per_example, sums.per_example_weight, sums.per_example_correct))
        note(last - first)
    document, nll, weight, correct = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(document, kind="stable")
    weight = weight[order].astype(np.float64)
    return Losses(document[order], nll[order] / weight, correct[order] / weight)


def choose_failing(losses: Losses, allowed: np.ndarray, count: int) -> np.ndarray:
    """Returns the documents [at most count] that fail: not every supervised token is the argmax, highest loss first.

    `allowed` is bool [n], which documents of `losses` may be chosen.
    """
    places = np.flatnonzero(allowed & (losses.accuracy < 1))
    return losses.document[places[np.argsort(-losses.loss[places], kind="stable")][:count]]


def influence_scores(
    decoder: Decoder, train: RowStream, held_out: Sequence[tuple[RowStream, np.ndarray]], seed: int = 0, note: Note = lambda documents: None
) -> np.ndarray:
    """Returns [documents of train] the mean cosine of the gradient of each training document with those of held-out ones.

    The lower, the more a step on the document raises their loss. NaN for a document without a gradient.

    Args:
        decoder: carries no adapters.
        held_out: streams, and the documents of each that the model fails at; at least one in all.
        seed: of the random projection; the same seed gives the same scores.
        note: counts training documents that are done.
    """
    gradients, devices = make_gradients(decoder, seed), len(jax.devices())
    target, count = 0.0, 0
    for stream, numbers in held_out:
        for part, batch in unpacked_batches(stream, numbers, TOKENS * devices, devices):
            target = target + np.nansum(_units(gradients(batch))[: len(part)], axis=0, dtype=np.float64)
            count += len(part)
    scores = np.full(train.document_count, np.nan)
    for part, batch in unpacked_batches(train, range(train.document_count), TOKENS * devices, devices):
        scores[part] = _units(gradients(batch))[: len(part)] @ (target / count)
        note(len(part))
    return scores


def _units(gradients: jax.Array) -> np.ndarray:
    """Returns gradients [N, F] as unit vectors; NaN where there is none, or it is not finite."""
    values = np.asarray(gradients)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, norms, out=np.full_like(values, np.nan), where=(norms > 0) & np.isfinite(norms))
