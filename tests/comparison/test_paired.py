"""Paired tests against scipy and against enumeration; intervals and numbers of rows against drawn data."""

import itertools

import numpy as np
import pytest
import scipy.stats

from sft_jax.comparison import paired
from sft_jax.comparison.paired import compare_pair, holm, rows_needed
from sft_jax.evaluation.scorers import find_scorers
from sft_jax.evaluation.scoring import Answer, Scored, Scorer, score


def means(values, counted=None):
    """Scores of a scorer that averages."""
    values = np.asarray(values, float)
    counted = np.ones(len(values)) if counted is None else np.asarray(counted, float)
    return Scored(Scorer(lambda answer: ()), np.stack([values * counted, counted], axis=1))


def test_right_and_wrong_answers_are_tested_as_mcnemar_does():
    rng = np.random.default_rng(0)
    for n in (5, 30, 400):
        a, b = rng.random(n) < 0.7, rng.random(n) < 0.55
        found = compare_pair(means(a), means(b))
        wins, losses = int((a & ~b).sum()), int((~a & b).sum())
        expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert found.exact and found.p == pytest.approx(expected, rel=1e-9)
        assert (found.wins, found.losses, found.ties, found.answers) == (wins, losses, n - wins - losses, n)
        assert found.difference == pytest.approx(a.mean() - b.mean())


def test_few_answers_are_tested_over_all_signs():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.4, 1, 9), rng.normal(0, 1, 9)
    found = compare_pair(means(a), means(b))
    theirs = scipy.stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found.exact and found.p == pytest.approx(theirs.pvalue, rel=1e-9)


def test_many_answers_are_tested_by_random_signs():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.25, 1, 60), rng.normal(0, 1, 60)
    found = compare_pair(means(a), means(b))
    theirs = scipy.stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=40_000, rng=3)
    assert not found.exact and found.p == pytest.approx(theirs.pvalue, abs=0.015)  # three standard deviations of ours
    assert found == compare_pair(means(a), means(b))


def test_a_corpus_score_is_tested_by_swapping_answers():
    """Six prompts, so that sacrebleu can score all 64 ways to swap."""
    sacrebleu = pytest.importorskip("sacrebleu")
    references = [f"the {word} train leaves the station at {hour} in the morning" for hour, word in enumerate("red old slow fast blue new".split())]
    one = [text.replace("station", "house") if place % 2 else text for place, text in enumerate(references)]
    other = [text.replace("train leaves", "bus stays") for text in references]
    (scorer,) = find_scorers(["bleu"], "x").values()
    found = compare_pair(*(score(scorer, [Answer(*pair) for pair in zip(texts, references, strict=True)]) for texts in (one, other)))

    def bleu(texts):
        return sacrebleu.corpus_bleu(texts, [references]).score

    def swapped(mask):
        pairs = [(b, a) if swap else (a, b) for swap, a, b in zip(mask, one, other, strict=True)]
        return abs(bleu([a for a, _ in pairs]) - bleu([b for _, b in pairs]))

    observed = abs(bleu(one) - bleu(other))
    expected = np.mean([swapped(mask) >= observed - 1e-9 for mask in itertools.product([False, True], repeat=6)])
    assert found.p == pytest.approx(expected) and found.difference == pytest.approx(bleu(one) - bleu(other))
    low, high = found.interval
    assert low <= found.difference <= high


def test_without_a_difference_the_test_is_wrong_as_seldom_as_it_says(monkeypatch):
    monkeypatch.setattr(paired, "interval", lambda *rest, **more: None)
    rng = np.random.default_rng(4)
    found = [compare_pair(means(rng.random(24)), means(rng.random(24)), seed=n).p < 0.05 for n in range(400)]
    assert 0.02 <= np.mean(found) <= 0.08  # the standard deviation is 0.011


def test_the_interval_is_that_of_paired_differences():
    rng = np.random.default_rng(5)
    common = rng.normal(0, 10, 3000)
    a, b = common + rng.normal(0.1, 1, 3000), common + rng.normal(0, 1, 3000)
    found = compare_pair(means(a), means(b))
    error = (a - b).std(ddof=1) / np.sqrt(3000)
    low, high = (a - b).mean() - 1.96 * error, (a - b).mean() + 1.96 * error
    assert found.interval == pytest.approx((low, high), abs=0.3 * error)  # three standard deviations of a quantile of 1000 resamples
    assert found.spread == pytest.approx((a - b).std(ddof=1), rel=1e-9)


def test_answers_count_where_they_count_for_both():
    found = compare_pair(means([1, 1, 0, 1], [1, 0, 1, 1]), means([0, 1, 0, 0], [1, 1, 1, 0]))
    assert (found.answers, found.wins, found.ties) == (2, 1, 1)
    assert compare_pair(means([1], [0]), means([1], [1])) is None


def test_equal_answers_differ_in_nothing():
    found = compare_pair(means([1, 0, 1]), means([1, 0, 1]))
    assert (found.p, found.difference, found.ties, found.spread) == (1.0, 0.0, 3, 0.0)


def test_corrected_values_reject_what_holms_procedure_rejects():
    rng = np.random.default_rng(6)
    for _ in range(200):
        p = np.round(rng.random(rng.integers(1, 8)) ** 3, 3)
        rejected, order = set(), np.argsort(p, kind="stable")
        for place, index in enumerate(order):  # the procedure as Holm states it
            if p[index] > 0.05 / (len(p) - place):
                break
            rejected.add(int(index))
        assert {n for n, value in enumerate(holm(p)) if value <= 0.05 + 1e-12} == rejected


@pytest.mark.parametrize("pairs", [1, 3])
def test_with_so_many_rows_the_difference_is_found_four_times_in_five(pairs):
    count = rows_needed(0.5, 2.0, pairs)
    rng = np.random.default_rng(7)
    p = scipy.stats.ttest_1samp(rng.normal(0.5, 2.0, (4000, count)), 0, axis=1).pvalue
    assert np.mean(p < 0.05 / pairs) == pytest.approx(0.8, abs=0.03)
    assert rows_needed(0.0, 2.0) is None and rows_needed(0.5, float("nan")) is None


def test_no_number_of_rows_is_below_what_a_permutation_test_can_show():
    """Where all answers differ by as much, p is 2^(1 - n)."""
    for pairs in (1, 3, 10):
        count = rows_needed(1.0, 0.0, pairs)
        assert compare_pair(means(np.ones(count)), means(np.zeros(count))).p < 0.05 / pairs
        assert compare_pair(means(np.ones(count - 1)), means(np.zeros(count - 1))).p >= 0.05 / pairs


def test_answers_that_all_differ_alike_do_not_prove_that_others_would():
    right, wrong = means(np.ones(64)), means(np.zeros(64))
    bound = scipy.stats.binomtest(0, 64).proportion_ci(0.95, method="wilson").high
    assert compare_pair(right, right).interval == pytest.approx((-bound, bound))
    assert compare_pair(right, wrong).interval == pytest.approx((1 - 2 * bound, 1.0))
    assert compare_pair(wrong, right).interval == pytest.approx((-1.0, 2 * bound - 1))
    assert compare_pair(means(np.full(64, 0.5)), means(np.full(64, 0.5))).interval == (0.0, 0.0)
    mixed = means(np.arange(64) % 2)
    assert compare_pair(mixed, mixed).interval == pytest.approx((-bound, bound)) and compare_pair(mixed, mixed).p == 1
