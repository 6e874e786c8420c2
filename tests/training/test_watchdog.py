"""A step that hangs is told with the stacks of all threads, and nothing else is."""

import json
import time

from tiny_run import tiny_config

from sft_jax import fit
from sft_jax.training import run
from sft_jax.training.watchdog import Watchdog
from sft_jax.training.workdir import Workdir


def test_a_run_whose_step_hangs_writes_stacks_and_goes_on(tmp_path, monkeypatch, capfd):
    place = run.place_local
    calls = []

    def the_planted_hang(batch, **options):
        calls.append(batch)
        if len(calls) == 4:
            time.sleep(2.5)
        return place(batch, **options)

    monkeypatch.setattr(run, "place_local", the_planted_hang)
    fit(tiny_config(tmp_path, train__steps=5, train__hang_seconds=1.0, checkpoint__every=0), tmp_path / "run")
    stacks = (tmp_path / "run/stacks/process_0.txt").read_text()
    errors = capfd.readouterr().err
    for text in (stacks, errors):
        assert "the_planted_hang" in text and "Thread" in text and "1 of at most 3" in text
    assert json.loads((tmp_path / "run/summary.json").read_text())["hangs"] >= 1


def test_dumps_are_few_and_ever_further_apart(tmp_path):
    with Watchdog(Workdir(tmp_path, lock=False), "stacks", 0.1) as watchdog:
        watchdog.step_ended()
        deadline = time.monotonic() + 30
        while watchdog.dumps < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)  # longer than until the next one, if there were no more limit
    assert watchdog.dumps == 3
    assert (tmp_path / "stacks").read_text().count("train.hang_seconds") == 3


def test_limits(tmp_path):
    watchdog = Watchdog(Workdir(tmp_path, lock=False), "stacks", None)
    assert watchdog.limit == 1800  # of the step that compiles
    watchdog.step_ended()
    assert watchdog.limit == 120
    watchdog._steps.extend([20.0, 30.0, 40.0])
    assert watchdog.limit == 300
    with watchdog.longer():
        assert watchdog.limit == 1800
    assert Watchdog(Workdir(tmp_path, lock=False), "stacks", 3000.0).limit == 3000


def test_nothing_is_watched_where_it_is_off(tmp_path):
    with Watchdog(Workdir(tmp_path, lock=False), "stacks", 0) as watchdog:
        watchdog.step_ended()
        time.sleep(0.3)
    assert watchdog.dumps == 0 and not (tmp_path / "stacks").exists()
