"""The stream of training rows, and the grain graph that reads it in batches.

Everything is a function of the row number. The position of a run is one integer, the number of rows it has used, and
does not depend on the batch size or the number of processes.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from sft_jax.batch import Batch
from sft_jax.data.packing.corpus import Corpus
from sft_jax.data.packing.mixture import make_mixture
from sft_jax.data.packing.overlength import Documents, supervised_targets, target_weights
from sft_jax.data.packing.plan import PackPlan, plan_rows
from sft_jax.data.packing.rows import fill_rows, read_documents
from sft_jax.errors import UserError

PLAN_FORMAT = 2  # counts up when the same inputs give other rows


_BLOCK = 256  # rows of which counts are kept as running totals


class SetCounts(NamedTuple):
    """How much of one data set some rows of a stream hold, each document as often as it comes up."""

    documents: int
    tokens: int  # positions that are no padding
    supervised_tokens: int


class RowStream:
    """Rows of all epochs as one stream. Immutable; `read` may be called from several threads.

    Attributes:
        total_rows, max_length, max_segments: shape of the stream.
        plan_hash: of everything that decides the rows, the tokens of the stores included. It does not depend on how
            long the run is, nor on batch size and process count, so a run that is extended keeps it.
        examples: documents in the stream, each counted as often as it comes up.
        real_tokens, supervised_tokens: positions that are no padding; targets with a weight above 0.
        epoch_rows: rows of each whole epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: Sequence[Documents],
        *,
        max_length: int,
        max_segments: int,
        packing: bool = True,
        weights: Sequence[float | None] | None = None,
        weight_by: Literal["documents", "supervised_tokens"] = "documents",
        set_epochs: Sequence[float | None] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: float = 1.0,
        rows: int = 0,
        normalize: Literal["tokens", "examples"] = "tokens",
        log: Callable[[str], None] = lambda line: None,
    ):
        """Plans the stream.

        Args:
            documents: of each set of the corpus, as apply_overlength gives them; none of the sets is empty.
            weights: share of each set, or None for every document once an epoch; see sft_jax.data.packing.mixture.
            weight_by: what the weights are shares of.
            set_epochs: without weights, how often each set comes up in an epoch of the stream, None for once.
            epochs, rows: length of the stream; `rows` wins when above 0.
            normalize: "examples" divides the weights of an example by their sum, over all its pieces.
            log: takes lines about planning where it takes long.
        """
        self.max_length, self.max_segments = max_length, max_segments
        self._corpus = corpus
        self._documents = Documents.concatenate(list(documents))
        sizes = [len(part) for part in documents]
        weights = [None] * len(sizes) if weights is None else list(weights)
        lengths, supervised = self._documents.lengths, supervised_targets(corpus, self._documents)
        amounts = sizes
        if weight_by == "supervised_tokens":
            amounts = np.add.reduceat(supervised, np.cumsum([0, *sizes[:-1]])).tolist()
        mixture = make_mixture(sizes, weights, seed, shuffle, amounts, set_epochs)
        self._scales = _example_scales(corpus, self._documents) if normalize == "examples" else None
        self._plan = plan_rows(
            lengths, mixture.epoch, max_length=max_length, max_segments=max_segments, packing=packing, seed=seed,
            shuffle=shuffle, epochs=epochs, rows=rows, log=log,
        )  # fmt: skip
        self.total_rows = self._plan.rows
        self.epoch_rows = self._plan.epoch_rows
        self._set_sizes = sizes
        self._measures = (lengths, supervised)
        block = np.repeat(np.arange(self.total_rows) // _BLOCK, np.diff(self._plan.offsets))  # of each placed document
        counts = self._count(self._plan.documents, block, -(-self.total_rows // _BLOCK))
        self._totals = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])  # [blocks + 1, sets, 3]
        everything = SetCounts(*self._totals[-1].sum(axis=0).tolist())
        self.examples, self.real_tokens, self.supervised_tokens = everything

        digest = hashlib.blake2b(digest_size=16)
        options = (
            PLAN_FORMAT, max_length, max_segments, packing, seed, shuffle, normalize, mixture.counts,
            tuple(store.content for store in corpus.stores), self._plan.first_epoch_hash,
        )  # fmt: skip
        digest.update(repr(options).encode())
        d = self._documents
        for array in (d.example, d.head, d.start, d.stop):
            digest.update(np.ascontiguousarray(array, "<i8"))
        self.plan_hash = digest.hexdigest()

    def read(self, first: int, count: int) -> Batch:
        """Returns the rows [first, first + count) as a Batch [count, max_length]; rows beyond the end are padding."""
        if first < 0 or count < 0:
            raise ValueError(f"rows {first} to {first + count}")
        return fill_rows(
            self._corpus, self._documents, self._plan, first, count,
            max_length=self.max_length, max_segments=self.max_segments, scales=self._scales,
        )  # fmt: skip

    @property
    def corpus(self) -> Corpus:
        """The examples that documents are made of."""
        return self._corpus

    @property
    def documents(self) -> Documents:
        """What rows are made of, each piece of an example once, in the order of the files."""
        return self._documents

    @property
    def plan(self) -> PackPlan:
        """Which documents are in which row."""
        return self._plan

    @property
    def document_count(self) -> int:
        """Documents that rows are made of, each counted once however often it comes up."""
        return len(self._documents)

    def document(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Returns (example number, ids int32 [n], weights float32 [n]) of document `index`, in the order of the files.

        Not shifted: weights[i] belongs to ids[i] as a target. A document is an example, or what an over-length policy
        left of one.
        """
        d = self._documents.select(np.array([index]))
        ids, weights = read_documents(self._corpus, self._corpus.offsets[d.example], d.head, d.start, d.stop)
        return int(d.example[0]), ids, weights

    def identity(self, example: int) -> tuple[str, str, int, int]:
        """Returns (set, file, line, turn) of an example number of `Batch.examples`; turn is -1 for a whole row."""
        return self._corpus.identity(int(example))

    def set_counts(self, row: int) -> dict[str, SetCounts]:
        """Returns how much of each set the rows before `row` hold, exactly; of all rows where `row` is `total_rows`."""
        row = min(row, self.total_rows)
        offsets, first = self._plan.offsets, row // _BLOCK * _BLOCK
        placed = self._plan.documents[offsets[first] : offsets[row]]
        counts = self._totals[row // _BLOCK] + self._count(placed, np.zeros(len(placed), np.int64), 1)[0]
        return {name: SetCounts(*part) for name, part in zip(self._corpus.names, counts.tolist(), strict=True)}

    def epochs_of_sets(self) -> dict[str, float]:
        """Returns how often each set comes up in the whole stream, such as 1.5."""
        counts = self.set_counts(self.total_rows)
        return {name: counts[name].documents / size for name, size in zip(counts, self._set_sizes, strict=True)}

    def _count(self, placed: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """Returns the counts of placed documents by group and set, in the order of SetCounts, int64 [groups, sets, 3]."""
        sets = len(self._set_sizes)
        place = group * sets + np.searchsorted(np.cumsum(self._set_sizes), placed, side="right")
        measures = (None, *(values[placed] for values in self._measures))
        # Sums of whole numbers in float64 are exact below 2**53.
        counts = [np.bincount(place, weights=values, minlength=groups * sets).astype(np.int64) for values in measures]
        return np.stack(counts, axis=-1).reshape(groups, sets, len(counts))

    def epoch_at(self, row: int) -> float:
        """Returns how many epochs the rows before `row` are, such as 1.5."""
        done = 0
        for epoch, rows in enumerate(self.epoch_rows):
            if row < done + rows:
                return epoch + (row - done) / rows
            done += rows
        return float(len(self.epoch_rows))


def _example_scales(corpus: Corpus, documents: Documents) -> np.ndarray:
    """Returns the factor that makes the weights of an example sum to 1 over its pieces, float32 [documents]."""
    numbers, group = np.unique(documents.example, return_inverse=True)
    sums = np.bincount(group, weights=target_weights(corpus, documents), minlength=len(numbers))
    return (1.0 / sums)[group].astype(np.float32)


class _Steps:
    """A grain source: item k is what one process needs for the k-th optimizer step from `first_row` on."""

    def __init__(self, stream, first_row: int, batch_size: int, micro_batch_size: int, index: int, count: int):
        self._stream, self._first_row, self._batch_size = stream, first_row, batch_size
        self._micro_batch_size, self._index, self._count = micro_batch_size, index, count

    def __len__(self) -> int:
        return max(0, -(-(self._stream.total_rows - self._first_row) // self._batch_size))

    def __getitem__(self, step: int) -> Batch:
        first = self._first_row + step * self._batch_size
        share = self._micro_batch_size // self._count
        try:
            parts = [
                self._stream.read(first + micro * self._micro_batch_size + self._index * share, share)
                for micro in range(self._batch_size // self._micro_batch_size)
            ]
        except (StopIteration, IndexError) as error:  # an iterator takes these for the end of the data
            raise RuntimeError(f"reading rows {first} to {first + self._batch_size} failed: {error!r}") from error
        return Batch(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))


def batches(
    stream: RowStream,
    first_row: int,
    batch_size: int,
    micro_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
) -> Iterator[tuple[int, Batch]]:
    """Yields (next_row, batch) for every optimizer step from row `first_row` to the end of the stream.

    `batch` has the leading shape [A, b / P]: micro-batch a of a step that begins at row r is the global rows
    [r + a * b, r + (a + 1) * b), of which process p holds the p-th contiguous part; so which rows are summed together
    does not depend on the process count. `next_row` is the position to resume at: rows used so far, at most
    total_rows, since the padding of the last batch is no row. Batches are read ahead by `threads` threads (0: none).

    Raises UserError where the sizes do not divide. An exception in the stream reaches the caller; the iterator never
    ends early.
    """
    import grain  # here, since it imports jax where that is installed: preparing data should not take seconds more

    if batch_size % micro_batch_size:
        raise UserError(f"train.micro_batch_size: {micro_batch_size} does not divide train.batch_size {batch_size}.")
    if micro_batch_size % process_count:
        raise UserError(
            f"train.micro_batch_size: {micro_batch_size} rows cannot be shared by {process_count} processes; "
            f"choose a multiple of {process_count}."
        )
    steps = _Steps(stream, first_row, batch_size, micro_batch_size, process_index, process_count)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    if not len(steps):
        return
    reader = iter(grain.MapDataset.source(steps).to_iter_dataset(options))
    try:
        for step in range(len(steps)):
            batch = next(reader)  # an early end is a RuntimeError here (PEP 479)
            yield min(first_row + (step + 1) * batch_size, stream.total_rows), batch
    finally:
        reader.close()
