"""Sums of the log: windows, rates, steps that do not count, and what a checkpoint carries of them."""

import json

import pytest

from sft_jax.training.window import NAMES, Window


def step(loss_sum=10.0, weight=2.0, **values):
    own = {"loss_sum": loss_sum, "weight": weight, "grad_norm": 1.0, "learning_rate": 0.1, "loss_terms": {}}
    return dict.fromkeys(NAMES, 0.0) | own | values


def test_a_window_keeps_means_of_sums():
    window = Window()
    window.add(step(), 0.5)
    window.add(step(2.0, 8.0, learning_rate=0.2), 0.5)
    record = window.take()
    assert record["loss"] == pytest.approx(1.2) and record["learning_rate"] == 0.2  # a mean of means would be 2.625


def test_terms_of_the_loss_are_means_over_the_same_tokens():
    window = Window()
    window.add(step(10.0, 2.0, loss_terms={"z_loss": 1.0}), None)
    window.add(step(2.0, 8.0, loss_terms={"z_loss": 4.0}), None)
    window.add(step(1.0, 1.0, nonfinite=1.0, loss_terms={"z_loss": float("nan")}), None)
    assert window.take()["z_loss"] == pytest.approx(0.5)
    window = Window(json.loads(json.dumps(window.state())))
    window.add(step(0.0, 0.0, empty=1.0, loss_terms={"z_loss": 0.0}), None)
    assert window.take()["z_loss"] is None and window.run.terms == {"z_loss": 5.0}


def test_a_step_that_is_not_finite_does_not_spoil_its_window():
    window = Window()
    nan = float("nan")
    window.add(step(), None)
    window.add(step(nan, 3.0, nonfinite=1.0, grad_norm=nan, real_tokens=7.0), None)
    record = window.take()
    assert record["loss"] == 5.0 and record["grad_norm"] == 1.0
    assert record["nonfinite_steps"] == 1 and record["real_tokens"] == 7
    window.add(step(nan, nan, nonfinite=1.0), None)
    record = window.take()
    assert record["loss"] is None and record["accuracy"] is None
    json.dumps([record, window.state()], allow_nan=False)
    assert window.run.all["nonfinite"] == 2


def test_rates_are_those_of_timed_steps_and_missing_without_one():
    window = Window()
    window.add(step(real_tokens=100.0), None)
    assert "real_tokens_per_second" not in window.take()
    window.add(step(real_tokens=100.0), None)
    window.add(step(real_tokens=30.0), 2.0)
    record = window.take()
    assert record["real_tokens"] == 130 and record["real_tokens_per_second"] == 15 and record["seconds_per_step"] == 2


def test_a_window_goes_on_from_a_checkpoint():
    steps = [step(loss_sum=0.1 * i, weight=0.3, real_tokens=i) for i in range(1, 8)]
    whole, first = Window(), Window()
    for number, metrics in enumerate(steps):
        whole.add(metrics, 0.1)
        if number < 4:
            first.add(metrics, 0.1)
        if number == 1:
            assert whole.take() == first.take()
    second = Window(json.loads(json.dumps(first.state())))
    for metrics in steps[4:]:
        second.add(metrics, 0.1)
    assert second.take() == whole.take() and second.state() == whole.state()
