"""Documents one to a row, in batches of few shapes."""

from collections.abc import Iterator, Sequence

import numpy as np

from sft_jax.batch import Batch, empty_batch
from sft_jax.data.packing.pipeline import RowStream

SHORTEST = 64  # positions of the shortest rows


def unpacked_batches(stream: RowStream, numbers: Sequence[int], tokens: int, multiple: int = 1) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (numbers [n], Batch [N, L] whose first n rows hold these documents of a stream), all documents once.

    Documents of similar length come together. L is SHORTEST times a power of two, at most the length of the stream's rows; N is what
    of such rows has `tokens` positions, at least one, rounded up to a multiple of `multiple`. Rows beyond the n-th are padding.
    """
    numbers = np.asarray(numbers, np.int64)
    lengths = stream.documents.lengths[numbers]
    buckets = np.minimum(SHORTEST << np.ceil(np.log2(np.maximum(lengths, 1) / SHORTEST)).clip(0).astype(np.int64), stream.max_length)
    for length in np.unique(buckets).tolist():
        size = -(-max(tokens // length, 1) // multiple) * multiple
        members = numbers[buckets == length]
        for first in range(0, len(members), size):
            part = members[first : first + size]
            yield part, _batch(stream, part, size, length)


def _batch(stream: RowStream, numbers: np.ndarray, rows: int, length: int) -> Batch:
    batch = empty_batch(rows, length, 1)
    for row, number in enumerate(numbers.tolist()):
        example, ids, weights = stream.document(number)
        count = len(ids) - 1
        batch.tokens[row, :count], batch.targets[row, :count], batch.weights[row, :count] = ids[:-1], ids[1:], weights[1:]
        batch.segments[row, :count], batch.positions[row, :count], batch.examples[row, 0] = 1, np.arange(count), example
    return batch
