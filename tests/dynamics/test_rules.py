"""Each rule on courses of loss drawn by hand among many ordinary ones."""

import numpy as np
import pytest
from drawn_histories import documents_of, exposures_of

from sft_jax.dynamics.histories import Histories, make_histories
from sft_jax.dynamics.parts import Documents
from sft_jax.dynamics.rules import RULES

COUNT, EPOCHS = 1000, 5
USUAL = (2.0, 0.5, 0.2, 0.1, 0.05)  # loss of an ordinary document in each epoch
COURSES = {  # document -> its losses
    10: (2.0, 2.0, 1.9, 1.9, 1.8),  # never learnt
    11: (2.0, 0.5, 0.2, 0.1, 1.2),  # forgotten
    12: (2.0, 2.0, 1.9, 1.5, 0.05),  # learnt late
    13: (0.2, 0.2, 0.2, 0.2, 0.2),  # neither better nor worse: what is usual has passed it by
    14: (9.0, 0.5, 0.2, 0.1, 0.05),  # hard before it was seen, then as the others
    15: (2.0, 1.9, 0.2, 0.1, 0.05),  # learnt at the third of five exposures: not late
    16: (2.0, 0.5, 1.5, 0.1, 0.05),  # forgotten and learnt again
    17: (2.0, 2.0, 1.9, 1.9, 1.8),  # as the first, but every token is right
}
EXPECTED = {"never_learnt": {10}, "forgotten": {11}, "learnt_late": {12}}


@pytest.fixture(scope="module")
def drawn() -> tuple[Histories, Documents]:
    rng = np.random.default_rng(1)
    losses = np.array(USUAL) * np.exp(0.3 * rng.normal(size=(COUNT, EPOCHS)))
    accuracy = np.full((COUNT, EPOCHS), 0.5)
    for document, course in COURSES.items():
        losses[document] = course
    accuracy[17] = 1.0
    documents = documents_of(COUNT)
    return make_histories(exposures_of(losses, accuracy, 10.0), documents), documents


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_rule_finds_its_course_and_no_other(drawn, kind):
    histories, documents = drawn
    found = RULES[kind].find(histories, documents)
    ordinary = set(histories.document[found.places].tolist()) - COURSES.keys()
    assert set(histories.document[found.places].tolist()) & COURSES.keys() == EXPECTED[kind]
    assert len(ordinary) <= 2, "of a thousand whose losses differ by chance"


def test_the_worst_are_those_that_stay_behind(drawn):
    histories, _ = drawn
    worst = histories.document[np.argsort(-histories.score)[:2]].tolist()
    assert set(worst) == {10, 17}
    place = histories.place(10)
    assert histories.loss[histories.begins[place] : histories.begins[place + 1]] == pytest.approx(COURSES[10])


def test_length_outliers_are_measured_against_answers_of_their_length():
    """Short answers have ten times the loss of long ones: a long one with the loss of a short one is an outlier, a short one is not."""
    rng = np.random.default_rng(2)
    supervised = np.where(np.arange(COUNT) < COUNT // 2, 3, 300)
    losses = np.where(supervised == 3, 1.0, 0.1)[:, None] * np.exp(0.2 * rng.normal(size=(COUNT, 2)))
    losses[700] = 1.0
    documents = documents_of(COUNT, supervised)
    histories = make_histories(exposures_of(losses, np.full(losses.shape, 0.5), supervised), documents)
    found = RULES["length_outlier"].find(histories, documents)
    assert histories.document[found.places[np.argmax(found.measure)]] == 700
    assert (histories.document[found.places] < COUNT // 2).sum() <= 10, "short answers differ by chance alone"


def test_one_exposure_says_nothing_of_what_can_be_learnt():
    losses = np.full((COUNT, 1), 0.5)
    losses[3] = 50.0
    documents = documents_of(COUNT)
    histories = make_histories(exposures_of(losses, np.zeros(losses.shape), 1.0), documents)
    assert not any(len(RULES[kind].find(histories, documents).places) for kind in EXPECTED)
    assert histories.document[np.argmax(histories.score)] == 3


def test_what_has_no_loss_is_counted_and_left_out():
    """Steps that were left out, and pieces without a supervised token."""
    losses = np.full((200, 3), 0.5)
    exposures = exposures_of(losses, np.zeros(losses.shape), 4.0)
    exposures.loss_sum[exposures.step == 2] = np.nan
    exposures.weight[:7] = 0
    histories = make_histories(exposures, documents_of(200))
    assert (histories.left_out, histories.unsupervised) == (50, 7)
    assert len(histories.step) == 600 - 57 and np.isfinite(histories.deviation).all()
    assert histories.counts.sum() == 543 and set(histories.counts) == {2, 3}
