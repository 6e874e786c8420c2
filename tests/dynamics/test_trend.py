"""Contemporaries against one loop over them, and against faults that must not move them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.dynamics.trend import LEAST, NORMAL, contemporaries


def one_by_one(step, group, values):
    """The same, a group and a step at a time."""
    median, spread = np.zeros(len(values)), np.zeros(len(values))
    for of in np.unique(group):
        members = np.flatnonzero(group == of)
        stretches, current = [], []
        for number in np.unique(step[members]):
            current += members[step[members] == number].tolist()
            if len(current) >= LEAST:
                stretches.append(current)
                current = []
        if current and stretches:
            stretches[-1] += current
        elif current:
            stretches.append(current)
        for places in stretches:
            middle = np.median(values[places])
            median[places] = middle
            spread[places] = NORMAL * np.median([value - middle for value in values[places] if value >= middle])
    return median, spread


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 900), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_contemporaries_are_those_of_one_loop(count, groups, steps, seed):
    rng = np.random.default_rng(seed)
    step, group = rng.integers(1, steps + 1, count), rng.integers(0, groups, count)
    values = rng.exponential(size=count)
    for ours, theirs in zip(contemporaries(step, group, values), one_by_one(step, group, values), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_fifth_of_faults_hardly_moves_what_a_loss_is_measured_against():
    rng = np.random.default_rng(0)
    values, step, group = np.abs(rng.normal(size=4000)), np.zeros(4000, int), np.zeros(4000, int)
    median, spread = (found[0] for found in contemporaries(step, group, values))
    values[rng.choice(4000, 800, replace=False)] += 50.0
    moved = [found[0] for found in contemporaries(step, group, values)]
    assert moved[0] < median + spread / 2 and moved[1] < 2 * spread


def test_a_set_is_measured_against_itself_and_a_time_against_its_own():
    """A hard set beside an easy one, and losses that fall tenfold, have no excess by that."""
    step = np.repeat(np.arange(20), 200)
    group = np.tile(np.repeat([0, 1], 100), 20)
    level = np.where(group == 1, 5.0, 1.0) * np.where(step < 10, 10.0, 1.0)
    median, spread = contemporaries(step, group, level)
    np.testing.assert_array_equal(median, level)
    assert (spread == 0).all()
