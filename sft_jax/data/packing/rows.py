"""Rows: a part of a pack plan as a Batch. The one place where the next-token shift happens."""

import numpy as np

from sft_jax.batch import Batch, empty_batch
from sft_jax.data.packing.corpus import Corpus
from sft_jax.data.packing.overlength import Documents
from sft_jax.data.packing.plan import PackPlan, ragged_arange


def fill_rows(
    corpus: Corpus,
    documents: Documents,
    plan: PackPlan,
    first: int,
    count: int,
    *,
    max_length: int,
    max_segments: int,
    scales: np.ndarray | None = None,
) -> Batch:
    """Returns the rows [first, first + count) of a plan; rows beyond its end are padding.

    A document of n tokens becomes tokens[:-1], targets[1:] and the weights of the targets, so its first token is
    never a target and nothing crosses from one document to the next. See sft_jax.batch for a worked example.

    Args:
        scales: factor on the weights of each document, float32 [documents]; None = 1.
    """
    batch = empty_batch(count, max_length, max_segments)
    last = min(first + count, plan.rows)
    if last <= first:
        return batch
    placed = plan.documents[plan.offsets[first] : plan.offsets[last]]
    per_row = np.diff(plan.offsets[first : last + 1])
    row = np.repeat(np.arange(len(per_row)), per_row)  # of each placed document
    slot = ragged_arange(np.zeros(len(per_row), np.int64), per_row)  # its number in the row
    batch.examples[row, slot] = documents.example[placed]

    head, start, stop = documents.head[placed], documents.start[placed], documents.stop[placed]
    tokens = head + stop - start
    lengths = tokens - 1
    ids, weights = read_documents(corpus, corpus.offsets[documents.example[placed]], head, start, stop)
    if scales is not None:
        weights = weights * np.repeat(scales[placed], tokens)

    begins = np.cumsum(lengths) - lengths  # positions before each document, over all rows
    columns = begins - begins[np.cumsum(per_row) - per_row][row]  # minus those of earlier rows
    position = ragged_arange(np.zeros(len(placed), np.int64), lengths)
    place = np.repeat(row * max_length + columns, lengths) + position
    source = np.repeat(np.cumsum(tokens) - tokens, lengths) + position
    batch.tokens.reshape(-1)[place] = ids[source]
    batch.targets.reshape(-1)[place] = ids[source + 1]
    batch.weights.reshape(-1)[place] = weights[source + 1]
    batch.segments.reshape(-1)[place] = np.repeat(slot + 1, lengths)
    batch.positions.reshape(-1)[place] = position
    return batch


def read_documents(corpus: Corpus, base, head, start, stop) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and weights of documents, concatenated; a document is its head and then its range."""
    starts = np.stack([base, base + start], axis=1).reshape(-1)
    stops = np.stack([base + head, base + stop], axis=1).reshape(-1)
    used = starts < stops  # most documents have no head
    return corpus.read_ids(starts[used], stops[used]), corpus.read_weights(starts[used], stops[used])
