"""A request to stop at every moment of a run of one process: what is saved, what is said, and that the run goes on."""

import os
import signal

import pytest
from tiny_run import metrics, tiny_config

from sft_jax import fit
from sft_jax.checkpoint.manifest import committed_steps
from sft_jax.errors import StoppedAsConfigured, StoppedBySignal
from sft_jax.training import run as run_lib
from sft_jax.training.signals import StopSignal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("signals")


def signalled(function, number=signal.SIGTERM):
    """Returns `function`, which gets a signal while it is called."""

    def call(*args, **kwargs):
        os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("phase", ["prepare_on_all_processes", "load_decoder", "cut_logs_back", "MetricsLog"])
def test_before_the_first_step_a_signal_ends_the_run_at_once(folder, tmp_path, monkeypatch, phase):
    config = tiny_config(folder, train__steps=2)
    monkeypatch.setattr(run_lib, phase, signalled(getattr(run_lib, phase)))
    with pytest.raises(StoppedBySignal, match="Stopped by SIGTERM before the first step of this start; there was nothing to save"):
        fit(config, tmp_path / "run")
    assert committed_steps(tmp_path / "run/checkpoints") == []


def test_a_signal_while_the_first_step_compiles_saves_after_it(folder, tmp_path, monkeypatch):
    make = run_lib.make_train_step
    monkeypatch.setattr(run_lib, "make_train_step", lambda *args: signalled(make(*args), signal.SIGINT))
    with pytest.raises(StoppedBySignal, match="Stopped by SIGINT after step 1 of 2; the state is saved"):
        fit(tiny_config(folder, train__steps=2), tmp_path / "run")
    assert committed_steps(tmp_path / "run/checkpoints") == [1]


def test_that_a_run_stops_as_configured_is_told_apart_from_a_signal_also_one_that_comes_while_it_saves(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, train__steps=2, train__stop_after_steps=1)
    with pytest.raises(StoppedAsConfigured, match="Stopped by stop_after_steps after step 1 of 2"):
        fit(config, tmp_path / "run")
    monkeypatch.setattr(run_lib, "saved_arrays", signalled(run_lib.saved_arrays))
    with pytest.raises(StoppedBySignal, match="Stopped by SIGTERM after step 1 of 2") as stopped:
        fit(config, tmp_path / "other")
    assert not isinstance(stopped.value, StoppedAsConfigured)


def test_a_signal_while_exporting_ends_the_run_whose_state_is_saved(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, train__steps=2, train__export=True, data__eval=str(folder / "held_out.jsonl"))
    monkeypatch.setattr(run_lib, "export_state", signalled(run_lib.export_state))
    with pytest.raises(StoppedBySignal, match="after step 2 of 2; the state is saved"):
        fit(config, tmp_path / "run")
    assert committed_steps(tmp_path / "run/checkpoints") == [2] and not (tmp_path / "run/export").exists()
    before = metrics(tmp_path / "run")
    monkeypatch.undo()
    summary = fit(config, tmp_path / "run")
    assert summary["finished"] and (tmp_path / "run/export/config.json").is_file()
    assert metrics(tmp_path / "run") == before  # nothing is recorded twice


def test_without_a_last_checkpoint_a_stop_at_the_end_saves(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, train__steps=2, checkpoint__save_last=False, data__eval=str(folder / "held_out.jsonl"))
    evaluator = run_lib.Evaluator.__call__

    def evaluate(self, state, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluator(self, state, step)

    monkeypatch.setattr(run_lib.Evaluator, "__call__", evaluate)
    with pytest.raises(StoppedBySignal, match="after step 2 of 2; the state is saved"):
        fit(config, tmp_path / "run")
    assert committed_steps(tmp_path / "run/checkpoints") == [2]


@pytest.mark.parametrize("before", [(), (signal.SIGTERM,)])
def test_a_second_interrupt_ends_the_process_at_once(before):
    with StopSignal() as stop:
        stop.at_once = False
        for number in (*before, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.name == ("SIGTERM" if before else "SIGINT")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_interrupt_also_ends_what_the_first_one_could_not():
    with StopSignal() as stop:
        with pytest.raises(StoppedBySignal):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
