"""Random packed batches with very uneven supervision, for tests of the loss and the step."""

import numpy as np
from tiny_models import packed_rows

from sft_jax.batch import Batch, check_batch

SEGMENTS = 6  # more than any row of `packed_rows` has


def random_batch(rows: int, length: int, seed: int = 0, vocab: int = 96, weights: str = "uneven") -> Batch:
    """Rows of four documents and some padding. The share of supervised tokens goes from 0 in the first row to 1.

    `weights`: "uneven" is any numbers, "binary" is 0 and 1, "none" is 0 everywhere.
    """
    rng = np.random.default_rng(seed)
    tokens, positions, segments = packed_rows(rng, rows, length, vocab)
    targets = rng.integers(0, vocab, (rows, length)).astype(np.int32)  # the last of a document is any token
    same = segments[:, :-1] == segments[:, 1:]
    targets[:, :-1][same] = tokens[:, 1:][same]
    share = np.linspace(0, 1, rows)[:, None] if rows > 1 else np.full((1, 1), 0.5)
    on = (rng.random((rows, length)) < share) & (segments > 0)
    size = {"uneven": rng.uniform(0.1, 3.0, (rows, length)), "binary": 1.0, "none": 0.0}[weights]
    examples = np.full((rows, SEGMENTS), -1, np.int32)
    for row in range(rows):
        count = segments[row].max()
        examples[row, :count] = 100 * row + np.arange(count)
    padding = segments == 0
    batch = Batch(
        tokens=np.where(padding, 0, tokens),
        targets=np.where(padding, 0, targets),
        weights=(on * size).astype(np.float32),
        segments=segments,
        positions=positions,
        examples=examples,
    )
    check_batch(batch)
    return batch
