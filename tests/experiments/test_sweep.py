"""A sweep of tiny runs: they are the runs that train would make, one that fails stops no other, and nothing is run twice."""

import contextlib
import csv
import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import commands
import jax
import pytest
from tiny_run import ROOT, as_flags, environment, final_checksums, metrics, tiny_config
from tiny_sweeps import STEPS, killed_on, tiny_changes, tiny_recipe

from sft_jax.config_parsing import parse_config
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.experiments import engine
from sft_jax.experiments.engine import Result
from sft_jax.experiments.metric import Metric
from sft_jax.experiments.overrides import read_grid
from sft_jax.experiments.runs import Run
from sft_jax.experiments.sweep import plan_sweep, run_sweep, summarise
from sft_jax.experiments.sweep_report import conclusions, plan_to_dict, to_dict, write_results
from sft_jax.training.run import fit
from sft_jax.training.signals import StopSignal

GRID = ["optim.learning_rate=1e-2,1e-3,1e30"]
SEEDS = [0, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture(scope="module")
def live_before():
    """Bytes of the arrays that tests before these have left."""
    return live_bytes()


@pytest.fixture(scope="module")
def swept(folder, live_before):
    """The sweep, stopped by SIGTERM in the middle of its second run and continued, its folder, and what was said."""
    lines: list[str] = []
    plan = planned(folder)
    with pytest.raises(StoppedBySignal, match="learning_rate=0.01_seed=1: Stopped by SIGTERM after step 1 of 3; the state is saved"):
        run(plan, folder / "out", log=killed_in_second_run(lines))
    return run(plan, folder / "out", log=lines.append), folder / "out", lines


def run(plan, out, retry=False, log=lambda line: None):
    with contextlib.closing(engine.open_experiment(str(out))) as work:
        return run_sweep(plan, work, retry, log)


def killed_in_second_run(lines):
    """A log that gets SIGTERM when the second run has made its first step, which train tells in a line of its own."""
    return killed_on("step 1/3", lines, times=2)


def planned(folder, grid=GRID, seeds=SEEDS, metric=None, **changes):
    return plan_sweep(tiny_recipe(folder, **changes), read_grid(grid), seeds, metric, lambda line: None)


def never(*args):
    raise AssertionError("a run was started")


@pytest.mark.slow
def test_the_runs_are_those_of_train(swept, folder):
    fit(parse_config(tiny_recipe(folder, optim__learning_rate=1e-3, seed=1)), folder / "alone")
    in_sweep = swept[1] / "runs/learning_rate=0.001_seed=1"
    assert metrics(in_sweep) == metrics(folder / "alone")
    assert final_checksums(in_sweep) == final_checksums(folder / "alone")


def test_the_best_is_first_and_has_the_mean_of_its_seeds(swept):
    sweep, out, _ = swept
    assert [point.name for point in sweep.points] == ["learning_rate=0.01", "learning_rate=0.001", "learning_rate=1e+30"]
    for point in sweep.points[:2]:
        values = [json.loads((result.folder / "summary.json").read_text())["eval_last"]["held_out"]["loss"] for result in point.results]
        assert point.estimate.mean == pytest.approx(sum(values) / 2) and point.estimate.count == 2
        assert point.estimate.low < min(values) and max(values) < point.estimate.high
    assert sweep.points[2].estimate is None


def test_a_run_whose_loss_is_not_finite_is_noted_and_the_others_go_on(swept):
    sweep, out, lines = swept
    assert [result.run.name for result in sweep.failed] == ["learning_rate=1e+30_seed=0", "learning_rate=1e+30_seed=1"]
    assert all("not finite" in result.message and "train.jsonl:" in result.message for result in sweep.failed)
    assert any(line.startswith("  failed: step 2: the loss or a gradient is not finite") for line in lines)
    assert sum(line.startswith("failed: ") for line in conclusions(sweep)) == 2


def test_the_cost_is_told_first_and_what_is_left_after_each_run(swept, folder):
    _, _, lines = swept
    assert any("about" in line and line.endswith("left") for line in lines)
    plan = planned(folder)
    reports = [json.loads((swept[1] / "runs" / run.name / "data_report.json").read_text()) for run in plan.runs[:1]]
    assert plan.costs[0].steps == STEPS and plan.costs[0].tokens == reports[0]["train"]["stream"]["tokens"]
    assert plan.costs[0].rows == {"train": 96}
    assert len(plan_to_dict(plan)["runs"]) == 6 and f"6 runs, {STEPS} steps" in str(plan)


def test_what_has_ended_is_not_run_again_and_what_has_failed_only_when_asked(swept, folder, monkeypatch):
    sweep, out, _ = swept
    monkeypatch.setattr(engine, "fit", never)
    again = run(planned(folder), out)
    assert to_dict(again, []) == to_dict(sweep, [])
    started = []
    monkeypatch.setattr(engine, "fit", lambda config, path: started.append(path.name) or never())
    with pytest.raises(AssertionError, match="a run was started"):
        run(planned(folder), shutil.copytree(out, folder / "retried"), retry=True)
    assert started == ["learning_rate=1e+30_seed=0"]


def test_a_folder_with_another_run_stops_the_sweep_before_anything_is_run(swept, folder, monkeypatch):
    monkeypatch.setattr(engine, "fit", never)
    with pytest.raises(UserError, match="optim.clip_norm: was 1.0 when .*learning_rate=0.01_seed=0 was run and is 0.5 now. Set it back"):
        run(planned(folder, optim__clip_norm=0.5), swept[1])
    run(planned(folder, log__every=2), swept[1])  # what changes no number may differ


def test_held_out_rows_that_changed_between_runs_are_noticed(swept, folder, monkeypatch):
    copied = shutil.copytree(swept[1], folder / "changed")
    manifest = copied / "runs/learning_rate=0.001_seed=0/manifest.json"
    changed = json.loads(manifest.read_text())
    changed["fingerprints"]["eval"] = "of other rows"
    manifest.write_text(json.dumps(changed))
    monkeypatch.setattr(engine, "fit", never)
    with pytest.raises(UserError, match=r"learning_rate=0.001_seed=0: its data \(eval\) are not those of .*learning_rate=0.01_seed=0"):
        run(planned(folder), copied)


def test_nothing_of_a_run_stays_in_memory(swept, live_before):
    assert live_bytes() - live_before < 100_000  # a run of the fixture has 0.3 MB of parameters, and moments


def test_a_signal_between_runs_and_one_too_late_for_a_run_end_the_sweep(folder, monkeypatch, tmp_path):
    plan = planned(folder, ["optim.learning_rate=1e-2,1e-3"], [0])
    with pytest.raises(StoppedBySignal, match="Stopped by SIGTERM after 0 of 2 runs"):
        run(plan, tmp_path / "between", log=killed_on("run 1 of 2", []))

    def late(config, path):
        with StopSignal() as stop:
            stop.at_once = False
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine, "fit", late)
    with pytest.raises(StoppedBySignal, match="Stopped by SIGTERM after 0 of 2 runs"):
        run(plan, tmp_path / "late")


@pytest.mark.parametrize("text", [None, '{"fingerprints": {"tok', "[]", "{}", '{"fingerprints": {"tokens": "t"}}'])
def test_a_finished_run_whose_manifest_is_damaged_is_named_with_the_remedy(swept, folder, tmp_path, monkeypatch, text):
    sweep, out, _ = swept
    monkeypatch.setattr(engine, "fit", never)
    shutil.copytree(out, tmp_path / "copied")
    path = tmp_path / "copied/runs" / next(result.run.name for result in sweep.results if result.summary) / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="manifest.json: .* Restore it, or remove the folder of the run."):
        run(planned(folder), tmp_path / "copied")


def made(name, *losses):
    """The runs of a setting: a loss each, NaN or null where it was none, "failed" where there is no end."""
    run = Run(name, name, SimpleNamespace(seed=0), {"optim.learning_rate": name})
    summaries = [None if loss == "failed" else {"eval_last": {"held": {"loss": loss}}, "seconds": {}, "steps": 3} for loss in losses]
    return [Result(run, Path(name), summary, None if summary else "the loss is not finite", None) for summary in summaries]


def test_a_setting_of_which_seeds_miss_is_not_the_best(tmp_path):
    metric = Metric("held", "loss", True)
    lucky, sound, worse = made("lucky", 0.1, "failed", math.nan), made("sound", 0.2, 0.22, 0.21), made("worse", 0.5, 0.52, 0.51)
    sweep = summarise(metric, [*lucky, *worse, *sound])
    assert [(point.name, point.missing, point.tied) for point in sweep.points] == [("sound", 0, None), ("worse", 0, False), ("lucky", 2, None)]
    assert conclusions(sweep)[0].startswith("lowest held/loss: sound")
    (note,) = sweep.notes
    assert "lucky: 2 of 3 runs have no value, since 1 failed and 1 finished with a held/loss that is no finite number" in note
    assert [point["missing"] for point in to_dict(sweep, [])["points"]] == [0, 0, 2]


def test_where_seeds_miss_of_every_setting_the_best_of_these_is_told_with_it():
    sweep = summarise(Metric("held", "loss", True), [*made("a", 0.3, "failed"), *made("b", 0.2, None), *made("c", None, None), *made("d", "failed")])
    assert [point.name for point in sweep.points[:2]] == ["b", "a"] and sweep.points[0].estimate.mean == 0.2
    told = " ".join(sweep.notes)
    assert "a: 1 of 2 runs" in told and "b: 1 of 2 runs" in told and "c: 2 of 2 runs have no value, since 2 finished" in told and "d: " not in told


def test_results_are_a_line_a_run_a_line_a_setting_and_a_page(swept):
    sweep, out, _ = swept
    with contextlib.closing(engine.open_experiment(str(out))) as work:
        names = write_results(sweep, work)
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["state"] for row in rows] == ["done"] * 4 + ["failed"] * 2
    assert float(rows[0]["value"]) == float(rows[0]["last held_out/loss"]) and rows[0]["optim.learning_rate"] == "0.01"
    lines = (out / "results.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 3
    text = (out / "results.html").read_text()
    assert text.count("<svg") == 1 and "learning_rate=0.001" in text and len(names) == 3


BAD = [
    (dict(metric="los"), "--metric: 'los' is no metric of the evaluation; did you mean 'loss'"),
    (dict(data__eval=""), "data.eval: is empty"),
    (dict(grid=["optim.name=adamw,adamv"]), "optim.name: 'adamv' is unknown; did you mean 'adamw'"),
    (dict(grid=["optim.warmup=2.0,5.0"]), "optim.warmup: 5 steps of warm-up leave no step of the 3 after them"),
    (dict(grid=["train.batch_size=8,12"], mesh__fsdp=8), "train.micro_batch_size: 12 rows do not divide over"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_what_is_wrong_is_told_before_the_first_run(folder, changes, message):
    with pytest.raises(UserError) as error:
        planned(folder, **changes)
    assert message in str(error.value)


def test_all_runs_are_of_the_day_on_which_the_experiment_began(tmp_path):
    recipe = {"data": {"date": ""}}
    today = engine.pinned(recipe, str(tmp_path))["data"]["date"]
    assert len(today) == 10 and engine.pinned(recipe, None)["data"]["date"] == today
    engine.open_experiment(str(tmp_path)).close()
    assert json.loads((tmp_path / "experiment.json").read_text()) == {"date": today}
    (tmp_path / "experiment.json").write_text('{"date": "2026-01-31"}')
    engine.open_experiment(str(tmp_path)).close()
    assert engine.pinned(recipe, str(tmp_path))["data"]["date"] == "2026-01-31" and recipe["data"]["date"] == ""
    assert engine.pinned({"data": {"date": "2026-02-01"}}, str(tmp_path))["data"]["date"] == "2026-02-01"


def test_a_second_run_compiles_nothing(folder, tmp_path):
    """On one device, where there is a cache: another learning rate and another seed are programs that are there."""
    (tmp_path / "recipe.json").write_text(json.dumps(tiny_recipe(folder)))
    done = subprocess.run(
        [sys.executable, ROOT / "tests/experiments/counted_compilations.py", tmp_path / "recipe.json", tmp_path / "out"],
        env={**environment(1, tmp_path / "xdg"), "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *others = json.loads(done.stdout.splitlines()[-1])
    assert first["compiled"] > 5 and [run["compiled"] for run in others] == [0, 0, 0]
    assert all(run["read"] > 5 for run in others)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(UserError, match="Several processes were started"):
        engine.open_experiment("runs/sweep")


def command(folder, *arguments, **options):
    return commands.run("sweep", *arguments, env=environment(8, folder / "xdg"), cwd=ROOT, **options)


def test_the_command_writes_one_object_and_says_with_3_that_runs_have_failed(swept, folder):
    config = tiny_config(folder, **tiny_changes(folder))
    done = command(
        folder, "--config=configs/sft.py", *as_flags(config), f"--workdir={swept[1]}", "--grid", *GRID, "--seeds=2", "--json",
        terminal=True,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == 2 and found["points"][0]["overrides"] == {"optim.learning_rate": 0.01}
    assert "6 of 6 runs have ended before." in done.stderr
    commands.assert_bar(done)


def test_the_bar_counts_the_tokens_of_all_runs_and_a_run_draws_none_of_its_own(folder, monkeypatch, tmp_path):
    """Three runs, of which the first has ended before; each says that it has made its first and its last step."""
    plan = planned(folder, ["optim.learning_rate=1e-2,1e-3,1e-4"], [0])
    terminals = []

    def fit(config, path):
        terminals.extend([sys.stdout.isatty(), sys.stderr.isatty()])
        for step in (1, 3):
            print(f"step {step}/3  loss 1.0")
        print("Reading.", file=sys.stderr)
        (path / "manifest.json").write_text(json.dumps({"fingerprints": {"tokens": "t", "eval": "e", "tokenizer": "k"}}))
        (path / "summary.json").write_text(json.dumps(summary := {"finished": True, "eval_last": {"held_out": {"loss": 1.0}}, "seconds": {}}))
        return summary

    monkeypatch.setattr(engine, "fit", fit)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    seen = []
    one = dataclasses.replace(plan, runs=plan.runs[:1], costs=plan.costs[:1])
    run(one, tmp_path / "out")
    terminals.clear()
    with contextlib.closing(engine.open_experiment(str(tmp_path / "out"))) as work:
        run_sweep(plan, work, False, lambda line: None, lambda what, done, total: seen.append((done, total)))
    tokens = plan.costs[0].tokens
    expected = [tokens, *(tokens * place + part for place in (1, 2) for part in (tokens // 3, tokens, tokens))]
    assert seen == [(done, 3 * tokens) for done in expected] and terminals == [False] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "optim.learning_rat=1", "--workdir=x"], "error: --grid: 'optim.learning_rat' is no key"),
        pytest.param(["--workdir=x"], "error: --grid: is missing", marks=pytest.mark.slow),
        pytest.param(["--grid=seed=1,2", "--seeds=2", "--workdir=x"], "error: --seeds: the settings have seeds", marks=pytest.mark.slow),
        pytest.param(["--grid=seed=1,2"], "error: --workdir: is missing", marks=pytest.mark.slow),
    ],
)
def test_bad_input_of_the_command_is_one_message(folder, arguments, message):
    done = command(folder, "--config=configs/quickstart.py", *arguments)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert message in done.stderr
