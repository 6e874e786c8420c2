"""Synthetic examples and corpora for tests of the data side: real stores on disk, contents drawn by hypothesis."""

import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from sft_jax.data.packing.corpus import Corpus
from sft_jax.data.packing.overlength import apply_overlength
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.stores.store import Store, encode, open_store
from sft_jax.data.stores.store_writer import ShardWriter, write_manifest

VOCABULARY = 1000


class Plain(NamedTuple):
    """An example as plain lists."""

    ids: list[int]
    weights: list[float]
    turn: int = -1
    turn_starts: tuple[int, ...] = ()
    turn_roles: tuple[int, ...] = ()


@st.composite
def examples(draw, min_tokens=2, max_tokens=12):
    """An example whose last token is supervised, so that every cut from the left keeps something."""
    n = draw(st.integers(min_tokens, max_tokens))
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=n, max_size=n))
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, 2.0]), min_size=n, max_size=n))
    weights[-1] = 1.0
    return Plain(ids, weights)


def random_examples(count: int, seed: int = 0, min_tokens: int = 2, max_tokens: int = 40) -> list[Plain]:
    rng = np.random.default_rng(seed)
    result = []
    for n in rng.integers(min_tokens, max_tokens + 1, count).tolist():
        weights = (rng.random(n) < 0.6).astype(float)
        weights[-1] = 1.0
        result.append(Plain(rng.integers(0, VOCABULARY, n).tolist(), weights.tolist()))
    return result


def make_store(plain: list[Plain], folder: Path, shard_tokens: int = 50) -> Store:
    """Writes examples to a store and opens it. Example i is line i + 1 of "rows.jsonl"."""
    shards, first = [], 0
    while first < len(plain) or not shards:
        stop, tokens = first, 0
        while stop < len(plain) and tokens < shard_tokens:
            tokens, stop = tokens + len(plain[stop].ids), stop + 1
        with ShardWriter(folder, len(shards), (first, stop), VOCABULARY) as writer:
            for start in range(first, stop, 3):
                part = list(enumerate(plain))[start : min(start + 3, stop)]
                encoded = encode([(index, e.ids, e.weights, e.turn, e.turn_starts, e.turn_roles) for index, e in part])
                writer.append(encoded, np.zeros(len(part), np.int64), np.array([index + 1 for index, _ in part]))
            shards.append(writer.finish({}, []))
        first = stop
    write_manifest(folder, "", shards, ["rows.jsonl"], {"rows": len(plain)})
    store = open_store(folder)
    assert store is not None
    return store


def make_corpus(*sets: list[Plain]) -> Corpus:
    """A corpus of sets named set_0, set_1, ... Their stores vanish with the process; memmaps stay readable."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):  # they need not survive a power cut
        stores = [make_store(plain, Path(folder) / str(index), 10 * len(plain)) for index, plain in enumerate(sets)]
        return Corpus([f"set_{index}" for index in range(len(sets))], stores)


def make_stream(*sets: list[Plain], max_length: int, overlength: str = "error", **options) -> RowStream:
    corpus = make_corpus(*sets)
    documents = [apply_overlength(corpus, index, overlength, max_length)[0] for index in range(len(sets))]
    options = {"max_segments": 4, **options}
    return RowStream(corpus, documents, max_length=max_length, **options)


def documents_of(batch, row: int) -> list[tuple[int, list[int], list[float]]]:
    """Reads a row back: (example, tokens with the last target, target weights) of each segment."""
    result = []
    for segment in range(1, int(batch.segments[row].max(initial=0)) + 1):
        at = np.flatnonzero(batch.segments[row] == segment)
        ids = batch.tokens[row, at].tolist() + [int(batch.targets[row, at[-1]])]
        assert batch.targets[row, at[:-1]].tolist() == ids[1:-1]
        result.append((int(batch.examples[row, segment - 1]), ids, batch.weights[row, at].tolist()))
    return result
