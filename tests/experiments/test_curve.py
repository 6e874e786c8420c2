"""The fit beside a brute-force search; how often intervals hold the truth, by simulation of known curves; what may be said of them."""

import numpy as np
import pytest
from scipy import optimize
from slow_values import slow

from sft_jax.experiments.curve import learning_curve, limit_of
from sft_jax.experiments.power_law import EXPONENTS, fit

ROWS = 8000
SIZES = np.array([1 / 16] * 3 + [1 / 8] * 3 + [1 / 4] * 2 + [1 / 2] * 2 + [1.0])


def drawn(a, b, c, noise, seed, relative=True):
    errors = noise * np.random.default_rng(1000 + seed).standard_normal(len(SIZES))
    truth = a + b * SIZES**-c
    return truth * np.exp(errors) if relative else truth + errors


def curve_of(values, lower=True, relative=True, limit=0.0, resamples=300, seed=0):
    return learning_curve(ROWS * SIZES, values, ROWS, lower=lower, relative=relative, limit=limit, seed=seed, resamples=resamples)


@pytest.mark.parametrize(("a", "b", "c"), [(0.5, 0.5, 0.5), (0.0, 1.0, 0.3), (2.0, 0.1, 1.5), (0.9, -0.2, 0.7)])
def test_without_noise_the_law_is_found(a, b, c):
    law = fit(SIZES, drawn(a, b, c, 0.0, 0)[None], relative=b > 0, floor=None).law
    np.testing.assert_allclose([law.offset[0], law.slope[0], law.exponent[0]], [a, b, c], rtol=0.05, atol=0.02)
    np.testing.assert_allclose(law.at(np.array([1.0, 2.0, 4.0]))[0], a + b * np.array([1.0, 2.0, 4.0]) ** -c, rtol=3e-3)


def test_the_least_squares_are_those_of_a_general_optimiser():
    """With absolute errors and none of them large no run counts less, and the fit is plain least squares."""
    rng = np.random.default_rng(3)
    for _ in range(5):
        values = 0.5 + 0.5 * SIZES**-0.5 + np.clip(0.01 * rng.standard_normal(len(SIZES)), -0.012, 0.012)
        found = fit(SIZES, values[None], relative=False, floor=0.0)
        bounds = ([0.0, -np.inf, EXPONENTS[0]], [np.inf, np.inf, EXPONENTS[1]])
        best = min(
            optimize.least_squares(lambda p: p[0] + p[1] * SIZES ** -p[2] - values, [0.3, 0.5, c], bounds=bounds).cost
            for c in (0.1, 0.4, 1.0, 2.0)
        )
        predicted = found.law.at(SIZES)[0]
        assert 0.5 * ((predicted - values) ** 2).sum() <= best * 1.15 + 1e-9


def test_a_wild_run_moves_the_fit_little():
    values = drawn(0.5, 0.5, 0.5, 0.01, 1)
    wild = values.copy()
    wild[4] *= 3
    before, after = (fit(SIZES, v[None], relative=True, floor=0.0).law.at(np.ones(1))[0, 0] for v in (values, wild))
    assert abs(after - before) < 0.05 and after > 0


def test_a_floor_holds_and_many_fits_are_those_of_each():
    values = np.stack([drawn(0.0, 1.0, 0.3, 0.05, seed) for seed in range(6)])
    together = fit(SIZES, values, relative=True, floor=0.0)
    assert (together.law.offset >= 0).all()
    for row, single in enumerate(values):
        alone = fit(SIZES, single[None], relative=True, floor=0.0).law
        np.testing.assert_allclose([part[row] for part in together.law], [part[0] for part in alone], rtol=1e-9)


CASES = {
    "loss": dict(a=0.5, b=0.5, c=0.5, noise=0.03, lower=True, relative=True, limit=0.0),
    "noisy loss": dict(a=0.05, b=0.1, c=0.8, noise=0.1, lower=True, relative=True, limit=0.0),
    "accuracy": dict(a=0.9, b=-0.1, c=0.5, noise=0.01, lower=False, relative=False, limit=1.0),
}


@pytest.mark.parametrize("case", ["loss", *slow("accuracy", "noisy loss")])
def test_intervals_hold_the_truth_about_as_often_as_they_say(case):
    known = CASES[case]
    a, b, c, noise = known["a"], known["b"], known["c"], known["noise"]
    held, said = np.zeros(2), []
    for seed in range(60):
        found = curve_of(drawn(a, b, c, noise, seed, known["relative"]), known["lower"], known["relative"], known["limit"], seed=seed)
        truth = [abs(b - b * multiple**-c) for multiple in (2, 4)]
        held += [gain.low <= true <= gain.high for gain, true in zip(found.gains, truth, strict=True)]
        said.append(found.verdict)
    assert (held / 60 > 0.88).all(), held / 60
    assert said.count("more data helps") >= 54 and "more data hurts" not in said  # of lack of fit there is an alarm in 20 at most


@pytest.mark.parametrize(
    ("a", "b", "c", "noise", "expected"),
    [(1.0, 0.0, 1.0, 0.01, "flat"), (1.0, 0.3, 0.3, 0.5, "cannot tell"), (1.0, 0.0, 1.0, 0.3, "cannot tell"), (0.3, 0.7, 0.4, 0.01, "more data helps"),
     (1.0, -0.3, 0.5, 0.01, "more data hurts")],
)  # fmt: skip
def test_what_may_be_said(a, b, c, noise, expected):
    found = [curve_of(drawn(a, b, c, noise, seed), limit=0.0).verdict for seed in range(12)]
    assert found.count(expected) >= 10, found


def test_sizes_that_no_law_goes_through_are_told():
    """The smallest fractions of a run have too few steps to learn at all, as those of the quickstart have."""
    bent = {1 / 16: 0.6, 1 / 8: 0.18, 1 / 4: 0.093, 1 / 2: 0.068, 1.0: 0.045}
    said = []
    for seed in range(10):
        values = np.array([bent[size] for size in SIZES]) * np.exp(0.03 * np.random.default_rng(seed).standard_normal(len(SIZES)))
        found = curve_of(values)
        said.append(found.verdict == "cannot tell" and "no such law goes through these sizes" in found.why)
    assert sum(said) >= 9


def test_the_verdict_gives_its_rule_and_the_same_runs_give_the_same_numbers():
    values = drawn(0.3, 0.7, 0.4, 0.01, 0)
    first, again = curve_of(values), curve_of(values)
    assert first.why.startswith("the 95 % interval [") and first.why.endswith("lies above 0")
    assert first.gains == again.gains
    low, high = first.band(np.array([500.0, 8000.0]))
    assert (low < first.at(np.array([500.0, 8000.0]))).all() and (first.at(np.array([500.0, 8000.0])) < high).all()


def test_fewer_runs_than_a_law_needs_are_refused():
    with pytest.raises(ValueError, match="four runs of three sizes"):
        learning_curve([1, 2, 4], [3.0, 2.0, 1.5], 4, lower=True, relative=True, limit=0.0)


def test_limits_are_those_of_the_metric():
    assert limit_of("loss", True, [1.0]) == (True, 0.0) and limit_of("perplexity", True, [2.0]) == (True, 1.0)
    assert limit_of("exact_match", False, [0.5]) == (False, 1.0) and limit_of("bleu:char", False, [40.0]) == (False, 100.0)
    assert limit_of("mine.py:points", False, [17.0]) == (False, None) and limit_of("mine.py:errors", True, [0.5]) == (False, None)


@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "bleu", "loss", "perplexity"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.7, 2.718])
def test_runs_of_one_value_are_flat(metric, value):
    lower, values = metric in ("loss", "perplexity"), np.full(len(SIZES), value)
    relative, limit = limit_of(metric, lower, values)
    found = curve_of(values, lower, relative, limit)
    assert found.verdict == "flat" and found.noise == 0 and {gain[1:] for gain in found.gains} == {(0.0, 0.0, 0.0)}
    assert np.array_equal(found.at(np.array([100, ROWS])), [value, value]) and np.array_equal(found.band(np.array([100, ROWS])), np.full((2, 2), value))
