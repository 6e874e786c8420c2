"""Batches against a plain Python version of the picture in sft_jax.batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_data import Plain, documents_of, examples, make_stream, random_examples

from sft_jax.batch import check_batch

sets_of_examples = st.lists(st.lists(examples(), min_size=1, max_size=8), min_size=1, max_size=2)


def test_the_picture():
    """The worked example of the Batch docstring, and a supervised first token that is never a target."""
    plain = [Plain([5, 6, 7], [1, 0, 1]), Plain([8, 9], [0, 1])]
    batch = make_stream(plain, max_length=8).read(0, 1)
    assert batch.tokens.tolist() == [[5, 6, 8, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 9, 0, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 2, 0, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.examples.tolist() == [[0, 1, -1, -1]]
    assert [array.dtype for array in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32, np.int32]


def test_token_zero_is_ordinary():
    """Neither padding nor weights are inferred from an id."""
    batch = make_stream([Plain([0, 0, 0], [0, 1, 1])], max_length=4).read(0, 1)
    assert batch.weights.tolist() == [[1, 1, 0, 0]] and batch.segments.tolist() == [[1, 1, 0, 0]]


@given(sets_of_examples, st.integers(1, 5), st.booleans(), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=40)
def test_rows_against_plain_python(sets, max_segments, packing, seed, data):
    max_length = data.draw(st.integers(11, 30))
    stream = make_stream(
        *sets, max_length=max_length, max_segments=max_segments, packing=packing, seed=seed, epochs=2.0
    )  # fmt: skip
    plain = [example for part in sets for example in part]
    batch = stream.read(0, stream.total_rows)
    check_batch(batch)
    seen = []
    for row in range(stream.total_rows):
        documents = documents_of(batch, row)
        assert 1 <= len(documents) <= (max_segments if packing else 1)
        for number, ids, weights in documents:
            assert ids == plain[number].ids and weights == plain[number].weights[1:]
            seen.append(number)
    assert sorted(seen) == sorted(2 * list(range(len(plain))))
    assert stream.examples == len(seen)
    assert stream.real_tokens == (batch.segments > 0).sum() == sum(len(plain[i].ids) - 1 for i in seen)
    assert stream.supervised_tokens == (batch.weights > 0).sum()
    counts = stream.set_counts(stream.total_rows)
    assert {name: part.documents for name, part in counts.items()} == {f"set_{i}": 2 * len(part) for i, part in enumerate(sets)}


@given(st.lists(examples(), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=30)
def test_any_read_is_a_slice_of_the_stream_and_padding_beyond(plain, data):
    stream = make_stream(plain, max_length=12, epochs=2.0)
    whole = stream.read(0, stream.total_rows)
    first = data.draw(st.integers(0, stream.total_rows + 2))
    count = data.draw(st.integers(0, stream.total_rows + 2))
    part = stream.read(first, count)
    check_batch(part)
    real = max(0, min(count, stream.total_rows - first))
    for got, expected in zip(part, whole, strict=True):
        assert got.shape[0] == count and (got[:real] == expected[first : first + real]).all()
    assert (part.segments[real:] == 0).all() and (part.examples[real:] == -1).all() and (part.tokens[real:] == 0).all()
    with pytest.raises(ValueError):
        stream.read(-1, 1)


@given(st.lists(examples(max_tokens=20), min_size=1, max_size=8), st.sampled_from(["split", "truncate_left"]))
@settings(deadline=None, max_examples=30)
def test_every_example_weighs_the_same(plain, overlength):
    """Under normalize="examples" the weights of an example sum to 1, over its pieces, in proportion as before."""
    options = {"max_length": 8, "overlength": overlength}
    stream = make_stream(plain, normalize="examples", **options)
    unscaled = make_stream(plain, **options)
    batch, before = stream.read(0, stream.total_rows), unscaled.read(0, unscaled.total_rows)
    assert (batch.examples == before.examples).all() and (batch.segments == before.segments).all()
    sums, sums_before = np.zeros(len(plain)), np.zeros(len(plain))
    for row in range(stream.total_rows):
        for (number, _, weights), (_, _, old) in zip(documents_of(batch, row), documents_of(before, row), strict=True):
            sums[number] += sum(weights)
            sums_before[number] += sum(old)
    assert np.allclose(sums, 1, atol=1e-6)
    for row in range(stream.total_rows):
        for (number, _, weights), (_, _, old) in zip(documents_of(batch, row), documents_of(before, row), strict=True):
            assert np.allclose(weights, np.array(old) / sums_before[number], atol=1e-6)


def test_identity_of_the_examples_of_a_row():
    sets = [random_examples(5, seed) for seed in (0, 1)]
    stream = make_stream(*sets, max_length=60)
    batch = stream.read(0, stream.total_rows)
    for row in range(stream.total_rows):
        for number, ids, _ in documents_of(batch, row):
            name, file, line, turn = stream.identity(number)
            assert sets[int(name[-1])][line - 1].ids == ids and file == "rows.jsonl" and turn == -1
