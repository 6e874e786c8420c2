"""Conflicts among rows: which rows, which side, and in which order."""

import numpy as np
from drawn_histories import documents_of, exposures_of

from sft_jax.dynamics.conflicts import find_conflicts
from sft_jax.dynamics.histories import make_histories


def test_rows_with_one_prompt_and_other_answers_conflict():
    last = np.array([0.9, 0.1, 0.5, 0.4, 0.3, 0.2, 0.6, 0.7])
    histories = make_histories(exposures_of(np.stack([np.ones(8), last], axis=1), np.zeros((8, 2)), 5.0), documents_of(8))
    rows = np.array([0, 1, 2, 3, 4, 4, 5, 6])  # row 4 has two documents, of which the last one has the last answer
    prompts = np.array([7, 7, 8, 8, 9, 9, 0], np.uint64)
    answers = np.array([1, 2, 3, 3, 4, 5, 6], np.uint64)
    conflicts = find_conflicts(histories, rows, prompts, answers)
    assert [conflict.places for conflict in conflicts] == [(5, 6), (1, 0)], "the undecided one first; equal answers are no conflict"
    np.testing.assert_allclose([conflict.margin for conflict in conflicts], [0.4, 0.8], rtol=1e-6)


def test_a_margin_is_to_the_nearest_other_answer():
    """And the one that is named has another answer, although one with the same has a higher loss."""
    last = np.array([0.1, 0.9, 0.5, 0.6])
    histories = make_histories(exposures_of(last[:, None], np.zeros((4, 1)), 5.0), documents_of(4))
    keys = np.full(4, 3, np.uint64)
    [conflict] = find_conflicts(histories, np.arange(4), keys, np.array([1, 1, 2, 3], np.uint64))
    assert conflict.places == (0, 2, 3, 1) and conflict.against == 3
    np.testing.assert_allclose(conflict.margin, 0.4, rtol=1e-6)
    assert not find_conflicts(histories, np.arange(4), np.zeros(4, np.uint64), np.arange(4).astype(np.uint64))
