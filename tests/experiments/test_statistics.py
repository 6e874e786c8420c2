"""Student's t and Welch's test beside scipy's; how often an interval covers, by simulation; which settings are tied."""

import numpy as np
import pytest
from scipy import stats

from sft_jax.experiments.statistics import differ, estimate, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 15, 40, 101])
def test_quantiles_are_those_of_scipy(freedom):
    for probability in (0.6, 0.9, 0.975, 0.999):
        np.testing.assert_allclose(t_quantile(probability, freedom), stats.t.ppf(probability, freedom), rtol=1e-9)


def test_an_interval_is_that_of_scipy():
    values = [0.31, 0.27, 0.4, 0.33]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose([found.mean, found.low, found.high], [np.mean(values), low, high])


def test_one_run_has_no_interval_and_says_nothing_of_differences():
    one = estimate([0.3])
    assert (one.low, one.high, one.count) == (None, None, 1)
    assert differ(one, estimate([0.1, 0.2])) is None


def test_settings_without_a_difference_are_told_apart_as_rarely_as_the_level_says():
    rng = np.random.default_rng(0)
    wrong = np.mean([differ(estimate(rng.normal(size=3)), estimate(rng.normal(scale=3, size=3))) for _ in range(3000)])
    assert 0.02 < wrong < 0.06  # degrees of freedom are rounded down, so it errs on the side of a tie


def test_a_difference_is_found_where_scipy_finds_it():
    rng = np.random.default_rng(1)
    agreed = 0
    for _ in range(200):
        a, b = rng.normal(size=5), rng.normal(loc=2, scale=2, size=4)
        p = stats.ttest_ind(a, b, equal_var=False).pvalue
        if abs(p - 0.05) > 0.015:  # between them lies the rounding of the degrees of freedom
            assert differ(estimate(a), estimate(b)) == (p < 0.05)
            agreed += 1
    assert agreed > 150


def test_equal_values_do_not_differ_and_others_without_noise_do():
    assert differ(estimate([1.0, 1.0]), estimate([1.0, 1.0])) is False
    assert differ(estimate([1.0, 1.0]), estimate([2.0, 2.0])) is True
