from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_jax.data.packing.mixture import make_mixture

sizes_lists = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(sizes_lists, st.integers(0, 3), st.booleans())
def test_without_weights_an_epoch_is_every_document_once(sizes, epoch, shuffle):
    mixture = make_mixture(sizes, [None] * len(sizes), shuffle=shuffle)
    assert sorted(mixture.epoch(epoch).tolist()) == list(range(sum(sizes)))


@given(sizes_lists, st.data(), st.booleans())
def test_a_weighted_epoch_takes_the_share_of_each_set_and_repeats_nothing_early(sizes, data, shuffle):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    mixture = make_mixture(sizes, weights, shuffle=shuffle)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    walks = [[] for _ in sizes]
    for epoch in range(5):
        documents = mixture.epoch(epoch)
        for index, walk in enumerate(walks):
            mine = documents[(documents >= bounds[index]) & (documents < bounds[index + 1])]
            share = weights[index] / sum(weights) * sum(sizes)
            assert abs(len(mine) - share) <= 0.5 + 1e-9 or len(mine) == 1 > share
            walk += mine.tolist()
    for index, walk in enumerate(walks):
        everything = list(range(bounds[index], bounds[index + 1]))
        for begin in range(0, len(walk) - sizes[index] + 1, sizes[index]):  # whole passes, across epochs
            assert sorted(walk[begin : begin + sizes[index]]) == everything
        assert max(Counter(walk).values()) - min([Counter(walk)[d] for d in everything]) <= 1


@given(sizes_lists, st.data())
def test_shares_of_something_else_than_documents(sizes, data):
    """An epoch has as much of it as all sets together, each its share, to the document."""
    means = data.draw(st.lists(st.integers(1, 50), min_size=len(sizes), max_size=len(sizes)))
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes)))
    amounts = [size * mean for size, mean in zip(sizes, means, strict=True)]
    counts = make_mixture(sizes, weights, amounts=amounts).counts
    for count, mean, weight in zip(counts, means, weights, strict=True):
        share = weight / sum(weights) * sum(amounts)
        assert abs(count * mean - share) <= mean * (0.5 + 1e-9) or count == 1 > share / mean
    assert make_mixture(sizes, weights, amounts=sizes).counts == make_mixture(sizes, weights).counts


@given(sizes_lists, st.data())
def test_epochs_of_a_set_are_exact_over_many_epochs(sizes, data):
    """After e epochs of the run a set of n documents has come up e * n * its epochs times, rounded up, evenly."""
    tenths = data.draw(st.lists(st.integers(1, 35), min_size=len(sizes), max_size=len(sizes)))
    tenths = [max(count, -(-10 // size)) for count, size in zip(tenths, sizes, strict=True)]
    mixture = make_mixture(sizes, [None] * len(sizes), epochs=[count / 10 for count in tenths])
    bounds, seen = np.concatenate([[0], np.cumsum(sizes)]), Counter()
    for epoch in range(1, 12):
        seen.update(mixture.epoch(epoch - 1).tolist())
        for index, size in enumerate(sizes):
            mine = [seen[document] for document in range(bounds[index], bounds[index + 1])]
            assert sum(mine) == -(-epoch * size * tenths[index] // 10)  # in whole numbers: no float is rounded
            assert max(mine) - min(mine) <= 1


def test_passes_over_a_set_differ_in_order():
    mixture = make_mixture([50], [1.0])
    assert mixture.epoch(0).tolist() != mixture.epoch(1).tolist()
    assert mixture.epoch(1).tolist() == make_mixture([50], [1.0]).epoch(1).tolist()
    assert mixture.epoch(1).tolist() != make_mixture([50], [1.0], seed=1).epoch(1).tolist()


def test_unshuffled_is_the_order_of_the_data():
    assert make_mixture([3, 2], [None, None], shuffle=False).epoch(4).tolist() == [0, 1, 2, 3, 4]


def test_weights_are_normalised():
    assert make_mixture([30, 10], [3, 1]).counts == make_mixture([30, 10], [0.75, 0.25]).counts == (30, 10)


def test_halves_are_rounded_to_even_whatever_the_floats():
    assert make_mixture([1, 6], [9.989565361575567] * 2).counts == (4, 4)
    assert make_mixture([1, 4], [0.1] * 2).counts == (2, 2)
    assert make_mixture([3, 3], [0.1, 0.2]).counts == (2, 4)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="for all sets or for none"):
        make_mixture([1, 2], [None, 1.0])
    with pytest.raises(ValueError, match="less than one document"):
        make_mixture([9, 9], [None, None], epochs=[None, 0.1])
    with pytest.raises(ValueError, match="cannot both be given"):
        make_mixture([9, 9], [1.0, 1.0], epochs=[None, 2.0])
    with pytest.raises(ValueError, match="no documents"):
        make_mixture([1, 0], [None, None])
