"""The position contract: every row of the stream is a function of its number, and of nothing else.

Whatever the batch size, the number of processes, the point at which a run was interrupted or the number of epochs
that were asked for: row r is row r, and the union over processes and steps is the stream, each row once.
"""

import functools
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_data import documents_of, examples, make_corpus, make_stream, random_examples

from sft_jax.batch import Batch
from sft_jax.data.packing.overlength import OVERLENGTH, apply_overlength
from sft_jax.data.packing.pipeline import RowStream, batches

FIELDS = ("tokens", "targets", "weights", "segments", "positions", "examples")
SETS = (random_examples(40, 1), random_examples(25, 2))
MIXTURES = ({}, {"weights": (1.0, 3.0)}, {"set_epochs": (0.5, None)}, {"set_epochs": (1.3, 2.0)})


@functools.cache
def corpus_of_sets():
    corpus = make_corpus(*SETS)
    return corpus, [apply_overlength(corpus, index, "error", 48)[0] for index in range(len(SETS))]


def stream_of_sets(**options) -> RowStream:
    return RowStream(*corpus_of_sets(), max_length=48, max_segments=4, **options)


def flatten(batch):
    """[A, b, ...] -> [A * b, ...], the order of the stream."""
    return [array.reshape(-1, *array.shape[2:]) for array in batch]


def collect(stream, first_row, batch_size, micro, processes=1, steps=None):
    """Returns (next row, the rows of the steps in global order) as all processes together see them."""
    readers = [batches(stream, first_row, batch_size, micro, index, processes) for index in range(processes)]
    position, parts = first_row, []
    for step in itertools.islice(zip(*readers, strict=True), steps):
        assert len({next_row for next_row, _ in step}) == 1
        position = step[0][0]
        joined = [np.concatenate(arrays, axis=1) for arrays in zip(*(batch for _, batch in step), strict=True)]
        parts.append(flatten(joined))
    for reader in readers:
        reader.close()
    return position, [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def assert_is_stream(stream, rows, first, last):
    expected = stream.read(first, last - first)
    for name, got, want in zip(FIELDS, rows, expected, strict=True):
        assert (got[: last - first] == want).all(), name


def test_union_over_processes_is_the_stream():
    stream = stream_of_sets(epochs=2.0)
    for processes in (1, 2, 4):
        for batch_size, micro in ((8, 8), (8, 4), (12, 4)):
            end, rows = collect(stream, 0, batch_size, micro, processes)
            assert end == stream.total_rows
            assert_is_stream(stream, rows, 0, stream.total_rows)
            assert (rows[3][stream.total_rows :] == 0).all()  # segments: only the last batch is padded
            assert len(rows[0]) - stream.total_rows < batch_size


@given(st.data())
@settings(deadline=None, max_examples=25)
def test_interrupted_anywhere_and_continued_anyhow_it_is_the_same_stream(data):
    """Kill after any number of steps; go on with another batch size and process count; no row is lost or repeated."""
    stream = stream_of_sets(epochs=1.5, seed=data.draw(st.integers(0, 2)), **data.draw(st.sampled_from(MIXTURES)))
    position, seen = 0, []
    while position < stream.total_rows:
        processes = data.draw(st.sampled_from([1, 2, 4]))
        micro = processes * data.draw(st.integers(1, 3))
        batch_size = micro * data.draw(st.integers(1, 3))
        end, rows = collect(stream, position, batch_size, micro, processes, steps=data.draw(st.integers(1, 3)))
        assert_is_stream(stream, rows, position, end)
        seen += range(position, end)
        position = end
    assert seen == list(range(stream.total_rows))


@given(st.floats(0.05, 3), st.floats(0.05, 3), st.booleans(), st.sampled_from(MIXTURES))
@settings(deadline=None, max_examples=25)
def test_extending_a_run_keeps_every_row_and_loses_none(one, other, packing, mixture):
    short, long = (stream_of_sets(epochs=epochs, packing=packing, **mixture) for epochs in sorted([one, other]))
    assert short.plan_hash == long.plan_hash
    for a, b in zip(short.read(0, short.total_rows), long.read(0, short.total_rows), strict=True):
        assert (a == b).all()
    # The position after the short run is its last row, also where the last batch was padded.
    *_, (position, _) = batches(short, 0, 7, 7)
    assert position == short.total_rows


def test_steps_straddle_epochs():
    """No padding between epochs: only the rows of the last batch may be empty."""
    stream = stream_of_sets(epochs=3.0)
    assert stream.epoch_rows[0] % 8
    every = list(batches(stream, 0, 8, 8))
    assert all((batch.segments.max(axis=-1) > 0).all() for _, batch in every[:-1])


@given(
    st.lists(st.lists(examples(max_tokens=16), min_size=1, max_size=8), min_size=1, max_size=3),
    st.sampled_from([policy for policy in OVERLENGTH if policy != "error"]),
    st.booleans(),
    st.sampled_from([(1, 4, 4), (2, 4, 2), (4, 8, 4)]),
)
@settings(deadline=None, max_examples=30)
def test_documents_in_are_documents_out(sets, overlength, packing, layout):
    """The multiset of (tokens, weights) that training sees is the one that went in, or what the policy left of it."""
    processes, batch_size, micro = layout
    try:
        stream = make_stream(
            *sets, max_length=15 if overlength == "keep_last_turns" else 7, overlength=overlength, packing=packing
        )
    except ValueError as error:  # a set of which the policy leaves nothing
        assert "no documents" in str(error)
        return
    _, rows = collect(stream, 0, batch_size, micro, processes)
    batch = Batch(*rows)
    out = [document for row in range(len(batch.tokens)) for document in documents_of(batch, row)]
    plain = [example for part in sets for example in part]
    if overlength == "split":
        joined = {}
        for number, ids, weights in sorted(out, key=lambda d: d[0]):
            joined.setdefault(number, []).extend(w for w in zip(ids[1:], weights, strict=True) if w[1] > 0)
        for number, example in enumerate(plain):
            wanted = [w for w in zip(example.ids[1:], example.weights[1:], strict=True) if w[1] > 0]
            assert sorted(joined[number]) == sorted(wanted)
        return
    for number, ids, weights in out:
        example = plain[number]
        if len(example.ids) - 1 <= stream.max_length:
            assert ids == example.ids and weights == example.weights[1:]
        else:
            assert len(ids) - 1 == stream.max_length
            assert ids in (example.ids[: len(ids)], example.ids[-len(ids) :])
    numbers = [number for number, _, _ in out]
    assert len(numbers) == len(set(numbers))
    fitting = {n for n, example in enumerate(plain) if len(example.ids) - 1 <= stream.max_length}
    assert fitting <= set(numbers)


def test_the_order_of_the_data_matters():
    """Row identity is (file, line): another order of the same rows is another stream, with another hash."""
    plain, other = SETS[0], SETS[0][::-1]
    assert make_stream(plain, max_length=48).plan_hash != make_stream(other, max_length=48).plan_hash


def test_the_number_of_readers_changes_no_row():
    """Threads read ahead, and processes have a part each; together they read the stream in its order."""
    stream = stream_of_sets(epochs=2.0)
    for processes, threads in itertools.product((1, 2, 4), (0, 1, 2, 5)):
        readers = [batches(stream, 0, 8, 4, index, processes, threads=threads) for index in range(processes)]
        parts = []
        for step in zip(*readers, strict=True):
            parts.append(flatten(np.concatenate(arrays, axis=1) for arrays in zip(*(b for _, b in step), strict=True)))
        rows = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        assert_is_stream(stream, rows, 0, stream.total_rows)
