"""A run that was stopped, killed or moved ends like one that never was."""

import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
from slow_values import slow
from tiny_run import assert_same_exposures, environment, final_checksums, metrics, run_command, tiny_config, train_command

from sft_jax import fit
from sft_jax.data import prepare as prepare_module
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.evaluation import evals


def config_of(folder, **changes):
    """A run whose log windows, checkpoints, evaluations and stops do not fall on the same steps."""
    held_out = {"data__eval": {"held": str(folder / "held_out.jsonl")}, "eval__every": 5}
    return tiny_config(folder, **{"log__every": 3, **held_out, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def whole(folder):
    """A run that was never stopped."""
    workdir = folder / "whole"
    summary = fit(config_of(folder), workdir)
    assert summary["finished"] and summary["steps"] > 6
    return workdir


def test_stopped_runs_continue_bitwise(folder, whole):
    """Stopped twice: in the middle of a window, and after a step that is evaluated."""
    workdir = folder / "stopped"
    for steps, reached in ((4, 4), (1, 5)):
        with pytest.raises(StoppedBySignal, match=f"after step {reached} of"):
            fit(config_of(folder, train__stop_after_steps=steps), workdir)
        assert not (workdir / "summary.json").exists()
    summary = fit(config_of(folder), workdir)
    assert final_checksums(workdir) == final_checksums(whole)
    assert metrics(workdir) == metrics(whole)
    assert_same_exposures(workdir, whole)
    uninterrupted = json.loads((whole / "summary.json").read_text())
    for key in ("steps", "rows", "eval_first", "eval_last", "nonfinite_steps", "empty_steps"):
        assert summary[key] == uninterrupted[key], key
    assert summary["train"]["loss"] == uninterrupted["train"]["loss"] and summary["real_tokens_per_second"] > 0


@pytest.mark.slow
def test_a_stopped_run_draws_the_same_noise_and_logs_the_same_terms(folder):
    """With randomness, further terms of the loss that a window sums up, and the state of several optimizers."""
    options = {
        "train__neftune": 5.0, "loss__z_loss": 1e-2, "loss__label_smoothing": 0.1, "optim__name": "muon", "optim__schedule": "wsd",
        "optim__decay": 2.0, "model__dtype": "bfloat16", "train__micro_batch_size": 4, "mesh__data": 4, "mesh__fsdp": 1, "mesh__tensor": 2,
    }  # fmt: skip
    config = lambda **changes: config_of(folder, train__steps=6, **options, **changes)  # noqa: E731
    fit(config(), folder / "options")
    with pytest.raises(StoppedBySignal, match="after step 4 of"):
        fit(config(train__stop_after_steps=4), folder / "options_stopped")
    fit(config(), folder / "options_stopped")
    assert final_checksums(folder / "options_stopped") == final_checksums(folder / "options")
    records = metrics(folder / "options")
    assert metrics(folder / "options_stopped") == records
    trained = [record for record in records if record["split"] == "train"]
    assert all(record["z_loss"] > 0.1 and record["label_smoothing"] > 0 for record in trained)
    assert not any("z_loss" in record or "label_smoothing" in record for record in records if record not in trained)


@pytest.mark.slow
def test_a_stop_while_evaluating_leaves_the_evaluation_to_the_next_start(folder, whole, monkeypatch):
    """In the middle of the run and at its end; the state is saved before anything else."""
    workdir = folder / "stopped_evaluating"
    evaluate = evals.evaluate_documents
    calls = []

    def signalled(*args):
        calls.append(args)
        if len(calls) in (2, 5):  # steps 0 and 5; then 5 once more, 10, and the last one
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(evals, "evaluate_documents", signalled)
    with pytest.raises(StoppedBySignal, match="Stopped by SIGTERM after step 5 of"):
        fit(config_of(folder), workdir)
    assert [record["step"] for record in metrics(workdir)] == [0, 3]
    last = final_checksums(whole)["step"]
    with pytest.raises(StoppedBySignal, match=f"after step {last} of {last}; the state is saved"):
        fit(config_of(folder), workdir)
    fit(config_of(folder), workdir)
    assert final_checksums(workdir) == final_checksums(whole) and metrics(workdir) == metrics(whole)


def test_a_run_that_lost_its_end_makes_what_is_missing(folder, whole):
    """Killed after the last save: in the last evaluation, or before the summary."""
    workdir = folder / "no_summary"
    shutil.copytree(whole, workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    for left in (lines, lines[:-1]):
        (workdir / "summary.json").unlink()
        (workdir / "metrics.jsonl").write_text("".join(left))
        again = fit(config_of(folder), workdir)
        assert metrics(workdir) == metrics(whole)
        clock = ("seconds", "seconds_to_first_step", "peak_memory_bytes")
        assert {k: v for k, v in again.items() if k not in clock} == {k: v for k, v in summary.items() if k not in clock}


def test_a_finished_run_that_saved_no_last_step_is_not_trained_again(folder, capsys):
    workdir = folder / "not_saved"
    config = config_of(folder, train__steps=3, checkpoint__save_last=False, checkpoint__every=0)
    summary = fit(config, workdir)
    assert not any((workdir / "checkpoints").iterdir())
    assert fit(config, workdir) == json.loads(json.dumps(summary))
    assert "has finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="optim.learning_rate: was"):
        fit(config_of(folder, train__steps=3, optim__learning_rate=1.0), workdir)


def test_a_finished_run_that_is_extended_is_not_finished(folder, capsys):
    workdir = folder / "extending"
    fit(tiny_config(folder, train__steps=2), workdir)
    fit(tiny_config(folder, train__steps=2), workdir)
    assert "raise train.steps to extend it" in capsys.readouterr().out
    with pytest.raises(StoppedBySignal):
        fit(tiny_config(folder, train__steps=4, train__stop_after_steps=1), workdir)
    assert not (workdir / "summary.json").exists()


def test_checkpoints_that_cannot_be_used_are_never_trained_over(folder):
    """A step that has lost its manifest is damage; nor does the next start begin anew after all were set aside."""
    workdir = folder / "no_manifest"
    with pytest.raises(StoppedBySignal):
        fit(config_of(folder, train__stop_after_steps=3, checkpoint__every=0), workdir)
    (workdir / "checkpoints/3/manifest.json").unlink()
    (workdir / "checkpoints/3.backup").mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint of this run is damaged"):
            fit(config_of(folder), workdir)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3.damaged", "3.backup"}


@pytest.mark.slow
def test_a_run_whose_template_writes_the_date_continues_on_another_day(folder, monkeypatch):
    """The rows stay those of the day on which the run began."""
    template = folder / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    day = datetime.date(2026, 1, 30)

    class Clock(datetime.date):
        @classmethod
        def today(cls):
            return day

    monkeypatch.setattr(prepare_module, "datetime", SimpleNamespace(date=Clock))
    options = {"data__chat_template": str(template), "data__max_length": 192}
    fit(tiny_config(folder, **options), folder / "one_day")
    with pytest.raises(StoppedBySignal):
        fit(tiny_config(folder, **options, train__stop_after_steps=3), folder / "two_days")
    day = datetime.date(2026, 1, 31)
    fit(tiny_config(folder, **options), folder / "two_days")
    assert final_checksums(folder / "two_days") == final_checksums(folder / "one_day")
    assert metrics(folder / "two_days") == metrics(folder / "one_day")
    fit(tiny_config(folder, **options), folder / "next_day")  # another run is rendered on its own day
    reports = [json.loads((folder / name / "data_report.json").read_text()) for name in ("one_day", "two_days", "next_day")]
    assert [report["rendered_at"] for report in reports] == ["2026-01-30", "2026-01-30", "2026-01-31"]
    assert reports[0]["fingerprints"] == reports[1]["fingerprints"] != reports[2]["fingerprints"]


@pytest.mark.slow
def test_a_run_that_was_killed_before_it_saved_begins_anew(folder, whole):
    workdir = folder / "never_saved"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 0, "split": "eval", "loss": 9.0}\n{"step": 1, "split": "train", "loss": 8.0}\n')
    (workdir / "ledger").mkdir()
    (workdir / "ledger/steps_00000001_00000001.parquet").write_bytes(b"of a run that began here before")
    fit(config_of(folder), workdir)
    assert metrics(workdir) == metrics(whole)
    assert_same_exposures(workdir, whole)


def test_a_finished_run_stays_as_it_is(folder, whole, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    summary = fit(config_of(folder), whole)
    assert summary == json.loads((whole / "summary.json").read_text())
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    assert "has finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_longer_run_begins_with_the_shorter_one(folder, whole):
    """Extending from 1 to 2 epochs gives the rows of a run of 2 epochs; only the schedule may differ."""
    workdir = folder / "extended"
    constant = {"optim__schedule": "constant", "optim__warmup": 1.0, "log__every": 1, "data__eval": None, "eval__every": 0}
    fit(config_of(folder, train__epochs=1.0, **constant), workdir)
    steps = final_checksums(workdir)["step"]
    fit(config_of(folder, train__epochs=2.0, **constant), workdir)
    reference = folder / "two_epochs"
    fit(config_of(folder, train__epochs=2.0, **constant), reference)
    first, second = metrics(workdir), metrics(reference)
    # The last step of one epoch was padded; the steps before it saw the same rows with the same learning rate.
    assert first[: steps - 1] == second[: steps - 1]
    assert final_checksums(workdir)["position"] == final_checksums(reference)["position"]


@pytest.mark.slow
def test_the_schedule_of_an_extended_run_is_that_of_the_longer_one(folder, capsys):
    workdir = folder / "extended_cosine"
    every_step = {"log__every": 1, "data__eval": None, "eval__every": 0}
    fit(config_of(folder, train__steps=4, **every_step), workdir)
    fit(config_of(folder, train__steps=8, **every_step), workdir)
    assert "from step 5 on the learning rate follows the cosine schedule over 8 steps" in capsys.readouterr().out
    rates = [record["learning_rate"] for record in metrics(workdir)]
    cosine = lambda step, total: 1e-2 * 0.5 * (1 + np.cos(np.pi * step / (total - 1)))  # noqa: E731 (no warm-up: 3% of 8 steps)
    np.testing.assert_allclose(rates, [cosine(s, 4) for s in range(4)] + [cosine(s, 8) for s in range(4, 8)], rtol=1e-5, atol=1e-9)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(folder, whole, capsys):
    workdir = folder / "damaged"
    with pytest.raises(StoppedBySignal):
        fit(config_of(folder, train__stop_after_steps=5), workdir)
    victim = next(path for path in sorted((workdir / "checkpoints/5/arrays").rglob("*")) if path.is_file() and path.stat().st_size > 500)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    fit(config_of(folder), workdir)
    output = capsys.readouterr().out
    assert "Checkpoint 5 is damaged" in output and victim.name in output and "Continuing from checkpoint 4." in output
    assert (workdir / "checkpoints/5.damaged").is_dir()
    assert final_checksums(workdir) == final_checksums(whole)
    assert metrics(workdir) == metrics(whole)


def test_a_run_whose_checkpoints_are_all_damaged_stops(folder):
    workdir = folder / "hopeless"
    with pytest.raises(StoppedBySignal):
        fit(config_of(folder, train__stop_after_steps=3), workdir)
    for path in (workdir / "checkpoints").glob("*/manifest.json"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="every checkpoint of this run is damaged"):
        fit(config_of(folder), workdir)


@pytest.mark.parametrize("change, words", [({"optim__learning_rate": 1e-3}, "allow_changes=optim.learning_rate"), ({"data__max_length": 80}, "data.max_length.*cannot change")])
def test_changes_that_a_run_does_not_allow(folder, whole, change, words):
    with pytest.raises(UserError, match=words):
        fit(config_of(folder, train__epochs=3.0, **change), whole)


def test_changed_data_is_refused(folder):
    workdir = folder / "data_changed"
    rows = folder / "changing.jsonl"
    rows.write_text((folder / "train.jsonl").read_text())
    with pytest.raises(StoppedBySignal):
        fit(config_of(folder, data__train=str(rows), train__stop_after_steps=1), workdir)
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="data.train: .*changed since this run began"):
        fit(config_of(folder, data__train=str(rows)), workdir)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, *slow(16)])
def test_another_batch_size_goes_on_with_the_next_row(folder, batch):
    workdir = folder / f"batch{batch}"
    with pytest.raises(StoppedBySignal):
        fit(tiny_config(folder, train__stop_after_steps=3, mesh__fsdp=1, mesh__data=4, mesh__tensor=2), workdir)
    assert final_checksums(workdir)["position"] == 24
    allow = {"train__batch_size": batch, "checkpoint__allow_changes": "train.batch_size", "mesh__data": 4, "mesh__fsdp": 1, "mesh__tensor": 2}
    total = fit(tiny_config(folder, **allow), workdir)
    assert total["rows"] == final_checksums(folder / "whole")["position"]
    assert total["steps"] == 3 + -(-(total["rows"] - 24) // batch)


@pytest.mark.slow
def test_sigterm_saves_and_says_to_start_again(folder, whole):
    workdir = folder / "terminated"
    config = config_of(folder, mesh__fsdp=8)
    process = subprocess.Popen(train_command(config, workdir), env=environment(8, folder / "xdg"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Stopped by SIGTERM after step" in errors and "Traceback" not in errors
    result = run_command(config, workdir, folder / "xdg", devices=8)
    assert result.returncode == 0, result.stderr
    assert final_checksums(workdir) == final_checksums(whole)
    assert metrics(workdir) == metrics(whole)


@pytest.mark.slow
def test_sigkill_at_random_moments(folder, whole):
    """Killed at any moment, also while a checkpoint is being written, and started again until it ends."""
    workdir = folder / "killed"
    config = config_of(folder, checkpoint__every=1, mesh__fsdp=8)
    rng = random.Random(0)
    kills = 0
    for _ in range(12):
        process = subprocess.Popen(train_command(config, workdir), env=environment(8, folder / "xdg"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wanted = rng.randint(1, 4)
        for line in process.stdout:
            wanted -= line.startswith("step ")
            if wanted <= 0:
                time.sleep(rng.random() * 0.2)
                process.kill()
                break
        output, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -9, output
        kills += 1
    else:
        result = run_command(config, workdir, folder / "xdg", devices=8)
        assert result.returncode == 0, result.stderr
    assert kills >= 2
    assert final_checksums(workdir) == final_checksums(whole)
    assert metrics(workdir) == metrics(whole)
