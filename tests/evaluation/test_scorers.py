import math

import pytest

from sft_jax.evaluation.scorers import SCORERS, Score, exact_match, score


@pytest.mark.parametrize(
    ("generation", "reference", "expected"),
    [("Paris", "Paris", 1.0), (" Paris\n", "Paris", 1.0), ("p", "P", 0.0), ("", "  ", 1.0), ("a b", "a  b", 0.0)],
)
def test_exact_match_ignores_only_outer_white_space(generation, reference, expected):
    assert exact_match(generation, reference) == Score(expected, 1.0)


@pytest.mark.parametrize("name", SCORERS)
def test_scores_of_parts_add_up_to_the_score_of_the_whole(name):
    pairs = [("a", "a"), ("b", "c"), ("d", "d"), ("e e", "e"), ("f", "f ")]
    parts = [score(name, pairs[:1]), score(name, pairs[1:4]), score(name, pairs[4:])]
    assert sum(parts, Score()) == score(name, pairs)
    assert SCORERS[name]("same", "same").mean == 1.0


def test_a_score_of_nothing_is_not_zero():
    assert math.isnan(score("exact_match", []).mean)
