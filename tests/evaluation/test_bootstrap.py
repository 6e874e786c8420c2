import numpy as np
import pytest
import scipy.stats

from sft_jax.evaluation.bootstrap import interval, share_interval
from sft_jax.evaluation.results import describe_score
from sft_jax.evaluation.scoring import Scored, mean_of, ratio
from sft_jax.evaluation.text_scores import exact_match


def of_means(values, **rest):
    return interval(np.stack([values, np.ones(len(values))], axis=1), ratio, **rest)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "mean", "least"),
    [
        (lambda rng: rng.normal(3, 2, 60), 3, 0.92),
        (lambda rng: rng.random(80) < 0.3, 0.3, 0.93),
        (lambda rng: rng.exponential(1, 60), 1, 0.91),
    ],
    ids=["normal", "share", "skewed"],
)
def test_intervals_hold_the_truth_as_often_as_they_say(draw, mean, least):
    """1000 samples: of a coverage of 0.95 the share has a standard deviation of 0.007."""
    rng = np.random.default_rng(0)
    held = np.mean([low <= mean <= high for low, high in (of_means(draw(rng), seed=n, resamples=500) for n in range(1000))])
    assert least <= held <= 0.98


def test_an_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(size=4000)
    low, high = of_means(values)
    error = values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    narrow = of_means(values, level=0.5)
    assert low < narrow.low < narrow.high < high


def test_ratios_are_resampled_as_pairs():
    """Where every row has the same ratio, no resample has another one."""
    weights = np.random.default_rng(2).random(30)
    assert interval(np.stack([2 * weights, weights], axis=1), ratio) == pytest.approx((2.0, 2.0))


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(3).normal(size=50)
    assert of_means(values, seed=1) == of_means(values, seed=1) != of_means(values, seed=2)


def test_what_has_no_spread_has_no_width_and_what_is_nothing_has_no_interval():
    assert of_means(np.ones(20)) == (1.0, 1.0)
    assert of_means(np.ones(1)) is None
    assert interval(np.zeros((5, 2)), ratio) is None


@pytest.mark.parametrize("count", [2, 12, 64, 256])
def test_answers_that_are_all_right_or_all_wrong_have_the_interval_of_wilson(count):
    exact = scipy.stats.binomtest(0, count).proportion_ci(0.95, method="wilson")
    wrong, right = (np.stack([np.full(count, value), np.ones(count)], axis=1) for value in (0.0, 1.0))
    assert share_interval(wrong) == pytest.approx((0.0, exact.high)) and share_interval(right) == pytest.approx((1 - exact.high, 1.0))
    scored = Scored(mean_of(exact_match), right)
    assert describe_score(scored, 0)["interval"] == pytest.approx([1 - exact.high, 1.0])


@pytest.mark.parametrize("statistics", [[[1, 1], [0, 1]], [[2, 1], [2, 1]], [[0.5, 1], [0.5, 1]], [[0, 3], [0, 3]], [[1, 1]]])
def test_other_scores_are_no_shares(statistics):
    assert share_interval(np.array(statistics, float)) is None
