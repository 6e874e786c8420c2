"""The loss of held-out sets, document by document, from which that of any part of a set is made.

Letters: N documents of a set, in the order of its files.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sft_jax.batch import Batch
from sft_jax.data.packing.overlength import supervised_targets
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.packing.plan import ragged_arange
from sft_jax.evaluation.step import DocumentLoss, EvalStep
from sft_jax.evaluation.text import Decodes, continuation_text
from sft_jax.model.sharding import batch_sharding, pieces_along

_MAX_EXPONENT = 700.0  # keeps perplexity finite, since JSON has no infinity
_IN_FLIGHT = 2  # batches whose sums are fetched late, so that the host reads rows while devices compute

Values = dict[str, float | int]


class Interrupted(Exception):
    """An evaluation was given up since the run is to stop; it has no result."""


class DocumentSums(NamedTuple):
    """Sums over the supervised tokens of each document, [N] each."""

    nll: np.ndarray  # float64, weight * negative log-likelihood in nats
    weight: np.ndarray  # float64
    correct: np.ndarray  # float64, weight where the target is the argmax
    tokens: np.ndarray  # int64
    bytes: np.ndarray | None = None  # int64, of the supervised text; None: not known

    def select(self, chosen: np.ndarray) -> "DocumentSums":
        """Returns those of the documents that `chosen` (bool [N] or indices) names."""
        return DocumentSums(*(None if part is None else part[chosen] for part in self))

    @property
    def weighted_bytes(self) -> np.ndarray:
        """float64 [N]: a document's bytes times the mean weight of its tokens, so that weights of 2 change no ratio."""
        return self.bytes * self.weight / np.maximum(self.tokens, 1)

    def values(self) -> Values:
        """Returns the values of these documents together; see `evaluate_loss`."""
        loss = float(self.nll.sum() / self.weight.sum())
        values = {"loss": loss, "perplexity": math.exp(min(loss, _MAX_EXPONENT))}
        if self.bytes is not None and (size := float(self.weighted_bytes.sum())) > 0:
            values["bits_per_byte"] = float(self.nll.sum()) / math.log(2) / size
        return {
            **values,
            "accuracy": float(self.correct.sum() / self.weight.sum()),
            "tokens": int(self.tokens.sum()),
            "examples": int((self.weight > 0).sum()),
        }


def evaluate_loss(
    eval_step: EvalStep,
    state: Any,
    stream: RowStream,
    batch_size: int,
    mesh: Mesh | None = None,
    stopping: Callable[[int], bool] = lambda late: False,
) -> Values:
    """Returns the token-weighted loss of a whole set; the arguments are those of `evaluate_documents`.

    Returns:
        loss: nats per token, weighted; perplexity: exp(loss); accuracy: weighted share of targets that are the argmax;
        tokens: supervised tokens; examples: documents with a supervised token.
    """
    return evaluate_documents(eval_step, state, stream, batch_size, mesh, stopping).values()


def evaluate_documents(
    eval_step: EvalStep,
    state: Any,
    stream: RowStream,
    batch_size: int,
    mesh: Mesh | None = None,
    stopping: Callable[[int], bool] = lambda late: False,
    sizes: np.ndarray | None = None,
) -> DocumentSums:
    """Returns the sums of every document of a set in which each comes up once.

    The step gives sums over each document; they are added on the host in float64 and divided once, so that results
    do not depend on batch size, packing or devices. Padding has no weight.

    Args:
        batch_size: rows of a batch over all devices; rounded up to a multiple of the devices that rows are split over.
        stopping: asked between batches with the number of those under way; Interrupted is raised where it says True.
        sizes: int64 [N], the bytes of the supervised text of each document, see `supervised_bytes`.

    Raises ValueError where no document has a supervised token.
    """
    groups = pieces_along(mesh, "batch") if mesh is not None else 1
    rows = -(-batch_size // groups) * groups
    nll, weight, correct = np.zeros((3, stream.document_count))
    waiting: deque[tuple[int, DocumentLoss]] = deque()

    def collect() -> None:
        first, sums = waiting.popleft()
        sums = jax.device_get(sums)
        last = min(first + rows, stream.total_rows)
        offsets = stream.plan.offsets[first : last + 1]
        placed, per_row = stream.plan.documents[offsets[0] : offsets[-1]], np.diff(offsets)
        where = np.repeat(np.arange(len(per_row)), per_row), ragged_arange(np.zeros(len(per_row), np.int64), per_row)
        for total, part in zip((nll, weight, correct), sums, strict=True):
            np.add.at(total, placed, part[where].astype(np.float64))

    for first in range(0, stream.total_rows, rows):
        waiting.append((first, eval_step(state, _read_rows(stream, first, rows, mesh))))
        if len(waiting) > _IN_FLIGHT:
            collect()
        if stopping(len(waiting)):
            raise Interrupted
    while waiting:
        collect()
    if not weight.sum() > 0:
        raise ValueError(f"the {stream.total_rows} rows of the set have no supervised token")
    return DocumentSums(nll, weight, correct, supervised_targets(stream.corpus, stream.documents), sizes)


def supervised_bytes(stream: RowStream, tokenizer: Decodes) -> np.ndarray:
    """Returns int64 [N], the UTF-8 bytes of the text of each document's supervised tokens; special tokens have none."""
    sizes = np.zeros(stream.document_count, np.int64)
    for index in range(stream.document_count):
        _, ids, weights = stream.document(index)
        supervised = np.concatenate([[0], weights[1:] > 0, [0]]).astype(np.int8)  # a first token is never a target
        edges = np.flatnonzero(np.diff(supervised)) + 1
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            text = continuation_text(tokenizer, ids[:start].tolist(), ids[start:stop].tolist())
            sizes[index] += len(text.encode("utf-8", "replace"))
    return sizes


def _read_rows(stream: RowStream, first: int, count: int, mesh: Mesh | None) -> Batch:
    """Returns the rows [first, first + count) on the devices; a process reads the rows of its own devices only."""
    return stream.read(first, count) if mesh is None else place_rows(stream.read, first, count, mesh)


def place_rows(read: Callable[[int, int], Batch], first: int, count: int, mesh: Mesh) -> Batch:
    """Returns the rows [first, first + count) over the mesh; `read` (first, count) is asked for those of this process's devices."""
    sharding = batch_sharding(mesh)
    places = sharding.addressable_devices_indices_map((count,)).values()
    ranges = [index[0].indices(count) for index in places]
    start, stop = min(begin for begin, _, _ in ranges), max(end for _, end, _ in ranges)
    local = read(first + start, stop - start)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(count)
            return array[(slice(begin - start, end - start), *index[1:])]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

    return Batch(*map(place, local))
