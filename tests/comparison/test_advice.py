"""The rule of advice over tables of numbers, and over drawn answers in which a better contender is planted, or none is."""

import itertools

import numpy as np
import pytest

from sft_jax.comparison.advice import Entry, Judged, Terms, advise
from sft_jax.comparison.paired import Pair, compare_pair, holm
from sft_jax.evaluation.bootstrap import Interval
from sft_jax.evaluation.scoring import Scored, Scorer

TERMS = Terms("exact_match", 200, False)


def against(entries, significant):
    """Pairs whose differences are those of the scores; `significant` names the pairs that differ."""

    def judged(one, other):
        difference = entries[one].score - entries[other].score
        p = 0.01 if {one, other} in significant else 0.5
        return Judged(Pair(difference, Interval(difference - 0.1, difference + 0.1), p, True, 0, 0, 0, 0.5, 200), p)

    return judged


def entries(*rows):
    return [Entry(name, score, cost, name.startswith("base")) for name, score, cost in rows]


CASES = [  # entries, pairs that differ -> verdict, choice
    ([("base", 0.2, 10), ("base 4", 0.5, 40), ("tuned", 0.9, 10)], [{0, 2}, {1, 2}, {0, 1}], "best", "tuned"),
    ([("base", 0.2, 10), ("base 4", 0.85, 40), ("tuned", 0.9, 10)], [{0, 2}, {0, 1}], "best", "tuned"),
    ([("base", 0.2, 10), ("base 4", 0.9, 40), ("tuned", 0.85, 10)], [{0, 2}, {0, 1}], "cheapest", "tuned"),
    ([("base", 0.2, 10), ("base 4", 0.9, 40), ("tuned", 0.5, 10)], [{0, 1}, {1, 2}], "best", "base 4"),
    ([("base", 0.5, 10), ("base 4", 0.6, 40), ("tuned", 0.55, 20)], [], "cannot tell", "base"),
    ([("base", 0.6, 10), ("base 4", 0.6, 40)], [], "cannot tell", "base"),
    # that two of the others differ says nothing of the highest
    ([("base", 0.5, 10), ("base 4", 0.7, 40), ("tuned", 0.8, 20)], [{0, 1}], "cannot tell", "base"),
    # of equal costs the higher score wins
    ([("base", 0.1, 10), ("one", 0.8, 20), ("other", 0.85, 20)], [{0, 1}, {0, 2}], "best", "other"),
]


@pytest.mark.parametrize(("rows", "significant", "verdict", "choice"), CASES)
def test_the_cheapest_that_is_not_significantly_below_the_best_wins(rows, significant, verdict, choice):
    found = entries(*rows)
    for order in itertools.permutations(range(len(found))):
        shuffled = [found[place] for place in order]
        renamed = [{order.index(place) for place in pair} for pair in significant]
        advice = advise(shuffled, against(shuffled, renamed), 3, TERMS)
        assert (advice.verdict, advice.choice) == (verdict, choice), order
        assert choice in advice.sentences[0] and "Holm-corrected for 3 pairs, alpha 0.05" in " ".join(advice.sentences)


def test_what_cannot_be_told_says_how_many_rows_would():
    found = entries(("base", 0.5, 10), ("tuned", 0.6, 20))
    advice = advise(found, against(found, []), 1, TERMS)
    assert advice.rows_needed == 197  # ((1.960 + 0.842) * 0.5 / 0.1)^2 = 196.2
    assert "would take about 197 rows (80% power)" in advice.sentences[0]
    same = entries(("base", 0.5, 10), ("tuned", 0.5, 20))
    advice = advise(same, against(same, []), 1, TERMS)
    assert advice.rows_needed is None and "score the same" in advice.sentences[0]


def test_prompting_is_held_against_the_other_models():
    found = entries(("base", 0.2, 10), ("base 4", 0.6, 40), ("tuned", 0.5, 10), ("tuned 2", 0.9, 10))
    advice = advise(found, against(found, [{1, 3}, {0, 3}, {2, 3}]), 6, TERMS)
    (sentence,) = (text for text in advice.sentences if text.startswith("Prompting against another model"))
    assert "0.6000 at best (base 4)" in sentence and "0.9000 (tuned 2): +0.3000" in sentence and sentence.endswith("is significant.")
    only = entries(("base", 0.2, 10), ("base 4", 0.6, 40))
    assert not any("Prompting" in text for text in advise(only, against(only, [{0, 1}]), 1, TERMS).sentences)


def test_costs_are_told_in_what_they_are():
    found = entries(("base", 0.2, 10_000), ("base 4", 0.9, 40_000), ("tuned", 0.85, 10_000))
    tokens = " ".join(advise(found, against(found, [{0, 1}, {0, 2}]), 3, TERMS).sentences)
    assert "10.0 tokens a request" in tokens and "costs 4 times as much" in tokens and "no price was given" in tokens
    assert "may be below base 4 by up to 0.1500" in tokens
    money = " ".join(advise(found, against(found, [{0, 1}, {0, 2}]), 3, Terms("exact_match", 200, True)).sentences)
    assert "1e+04 per 1,000 requests" in money and "no price" not in money


def answers(rng, chances, count):
    """Right and wrong answers of contenders to the same prompts, some of which are harder for all."""
    ease = rng.normal(0, 0.15, count)
    return [rng.random(count) < np.clip(chance + ease, 0, 1) for chance in chances]


def advice_of(outcomes):
    scored = [Scored(Scorer(lambda answer: ()), np.stack([found, np.ones(len(found))], axis=1)) for found in outcomes]
    pairs = {places: compare_pair(*(scored[place] for place in places)) for places in itertools.combinations(range(len(scored)), 2)}
    corrected = dict(zip(pairs, holm([pair.p for pair in pairs.values()]), strict=True))

    def judged(one, other):
        places = (min(one, other), max(one, other))
        found = Judged(pairs[places], corrected[places])
        return found if one < other else found.swapped()

    names = ["base", "base 4", "tuned"][: len(scored)]
    entered = [Entry(name, each.value, 10.0 + place, place < 2) for place, (name, each) in enumerate(zip(names, scored, strict=True))]
    return advise(entered, judged, len(pairs), TERMS)


def test_a_better_contender_that_is_planted_is_named(monkeypatch):
    monkeypatch.setattr("sft_jax.comparison.paired.interval", lambda *rest, **more: None)
    rng = np.random.default_rng(0)
    found = [advice_of(answers(rng, (0.4, 0.5, 0.8), 150)) for _ in range(60)]
    assert sum(advice.choice == "tuned" and advice.verdict == "best" for advice in found) >= 58


def test_equal_contenders_cannot_be_told_apart(monkeypatch):
    monkeypatch.setattr("sft_jax.comparison.paired.interval", lambda *rest, **more: None)
    rng = np.random.default_rng(1)
    found = [advice_of(answers(rng, (0.6, 0.6, 0.6), 150)) for _ in range(200)]
    told = sum(advice.verdict != "cannot tell" for advice in found)
    assert told <= 20  # a family-wise rate of 0.05 gives 10, with a standard deviation of 3
    assert all(advice.choice == "base" for advice in found if advice.verdict == "cannot tell")
