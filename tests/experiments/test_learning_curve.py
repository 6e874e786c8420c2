"""Runs on nested fractions of the rows, and the command that makes a curve of them."""

import contextlib
import csv
import doctest
import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
from tiny_run import ROOT, as_flags, environment, tiny_config
from tiny_sweeps import tiny_changes, tiny_recipe

from sft_jax.data.prepare import prepare
from sft_jax.errors import UserError
from sft_jax.experiments import engine, fractions
from sft_jax.experiments.engine import Result
from sft_jax.experiments.fractions import plan_curve, read_fractions, seed_counts
from sft_jax.experiments.learning import run_curve, summarise
from sft_jax.experiments.learning_report import conclusions, plan_to_dict, run_lines, to_dict, write_results
from sft_jax.experiments.metric import Metric

SIZES = ["1/4", "1/2", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("curve")


def planned(folder, sizes=SIZES, seeds=2, budget="epochs", metric=None, **changes):
    recipe = tiny_recipe(folder, train__steps=0, train__epochs=1.0, **changes)
    return plan_curve(recipe, read_fractions(sizes), seeds, budget, metric, lambda line: None)


def trained_lines(run) -> set[int]:
    """The lines of the file whose examples are in the rows that a run is trained on."""
    data = prepare(
        run.config.data, model_path=run.config.model.path, seed=run.seed, epochs=run.config.train.epochs, rows=0, log=lambda line: None
    )  # fmt: skip
    examples = np.unique(data.train.read(0, data.train.total_rows).examples)
    return {data.train.identity(int(example))[2] for example in examples[examples >= 0]}


def test_fractions_are_nested_for_each_seed_and_other_samples_for_other_seeds(folder):
    plan = planned(folder, ["1/8", "1/4", "1/2", "1"], seeds=4)
    lines = {(str(fraction), run.seed): trained_lines(run) for run, fraction in zip(plan.runs, plan.fractions, strict=True)}
    assert {key: len(found) for key, found in lines.items()} == {
        key: round(96 * Fraction(key[0])) for key in lines
    }  # fmt: skip
    for smaller, larger in (("1/8", "1/4"), ("1/4", "1/2"), ("1/2", "1")):
        shared = [seed for size, seed in lines if size == larger]
        assert shared and all(lines[smaller, seed] < lines[larger, seed] for seed in shared)
    assert len({frozenset(found) for (size, _), found in lines.items() if size == "1/8"}) == 4
    assert plan.rows == [len(found) for found in lines.values()] and plan.whole == 96


def test_the_cap_of_the_recipe_is_all_data(folder):
    path = str(folder / "train.jsonl")
    plan = planned(folder, data__train={"capped": {"path": path, "cap": 40}})
    assert plan.whole == 40 and plan.rows == [10, 10, 20, 20, 40]
    lines = [trained_lines(run) for run in plan.runs]
    assert lines[0] < lines[2] < lines[4]


def test_budgets_are_equal_epochs_or_equal_steps(folder):
    by_epochs, by_steps = planned(folder), planned(folder, budget="steps")
    steps = [cost.steps for cost in by_epochs.costs]
    assert steps[0] < steps[2] < steps[4] and [cost.steps for cost in by_steps.costs] == [steps[4]] * 5
    assert [run.config.train.steps for run in by_steps.runs] == [steps[4]] * 5
    assert not any(run.config.train.export or run.config.checkpoint.save_last for run in by_epochs.runs)


def test_small_fractions_have_more_seeds():
    assert not doctest.testmod(fractions).failed
    assert seed_counts(3, 1) == [1, 1, 1] and seed_counts(5, 5) == [5, 4, 3, 2, 1]


@pytest.fixture(scope="module")
def learned(folder):
    plan = planned(folder)
    with contextlib.closing(engine.open_experiment(str(folder / "out"))) as work:
        learning = run_curve(plan, work, False, lambda line: None)
        return learning, write_results(learning, work)


def test_the_curve_is_of_the_runs_and_they_leave_no_checkpoints(learned, folder):
    learning, files = learned
    found = to_dict(learning, files)
    assert [len(level["values"]) for level in found["levels"]] == [2, 2, 1]
    for result, rows in zip(learning.results, learning.plan.rows, strict=True):
        told = json.loads((result.folder / "data_report.json").read_text())["train"]["sets"]["train"]
        assert told["rows_beyond_cap"] == 96 - rows
        assert not (result.folder / "checkpoints").exists() and not (result.folder / "export").exists()
    assert len({result.data["tokens"] for result in learning.results}) == 1  # of one store
    value = json.loads((learning.results[-1].folder / "summary.json").read_text())["eval_last"]["held_out"]["loss"]
    assert found["levels"][-1]["values"] == [value]
    assert found["verdict"] in ("more data helps", "flat", "cannot tell", "more data hurts")
    assert [gain["multiple"] for gain in found["gains"]] == [2, 4]


def test_the_table_the_file_and_the_page_say_the_same(learned):
    learning, files = learned
    rows = list(csv.DictReader(open(files[0])))
    assert [row["fraction"] for row in rows] == ["1/4", "1/4", "1/2", "1/2", "1"] and all(row["state"] == "done" for row in rows)
    text = open(files[1]).read()
    assert text.count("<svg") == 1 and 'class="band"' in text and text.count('class="ring"') == 5
    assert any(learning.curve.why in line for line in conclusions(learning))
    assert run_lines(learning.plan)[0].split()[0] == "1/4" and "x 2 seeds" in run_lines(learning.plan)[0]


def test_it_is_not_run_again_and_what_does_not_compare_or_is_too_little_is_said(learned, folder, tmp_path, monkeypatch):
    out = shutil.copytree(folder / "out", tmp_path / "out")  # which is damaged here

    def fail(config, path):
        raise UserError("no such thing")

    monkeypatch.setattr(engine, "fit", fail)
    with contextlib.closing(engine.open_experiment(str(out))) as work:
        again = run_curve(planned(folder), work, False, lambda line: None)
        assert to_dict(again, []) == to_dict(learned[0], [])
        for run in again.plan.runs[:2]:
            (out / "runs" / run.name / "summary.json").unlink()
        broken = run_curve(planned(folder), work, False, lambda line: None)
        manifest = out / "runs" / again.plan.runs[2].name / "manifest.json"
        told = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**told, "fingerprints": {**told["fingerprints"], "tokens": "of other rows"}}))
        with pytest.raises(UserError, match=r"its data \(tokens\) are not those of"):
            run_curve(planned(folder), work, False, lambda line: None)
    assert broken.curve is None and "3 runs of 2 sizes" in broken.notes[-1] and len(broken.failed) == 2
    assert to_dict(broken, [])["verdict"] == "cannot tell"


def command(folder, out, *arguments, **options):
    """The command for the runs of `learned`."""
    config = tiny_config(folder, **tiny_changes(folder) | {"train__steps": 0})
    flags = ["--config=configs/sft.py", *as_flags(config), "--config.train.epochs=1.0", f"--fractions={','.join(SIZES)}", "--seeds=2"]
    flags += [f"--workdir={out}"] if out else []
    return commands.run("learning_curve", *flags, *arguments, env=environment(8, folder / "xdg"), cwd=ROOT, **options)


def test_the_command_says_the_cost_first_and_writes_one_object(learned, folder):
    done = command(folder, folder / "out", "--json", terminal=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {**to_dict(*learned), "files": found["files"]} and [Path(file).name for file in found["files"]] == ["curve.csv", "curve.html"]
    told = [done.stderr.index(text) for text in ("1/4 of the data", "5 runs on 24 to 96 rows", "5 of 5 runs have ended before.")]
    assert told == sorted(told)
    commands.assert_bar(done)


def test_a_dry_run_of_the_command_says_the_cost_and_makes_nothing(folder):
    done = command(folder, None, "--dry_run", "--json")
    assert done.returncode == 0, done.stderr
    plan = planned(folder)
    assert json.loads(done.stdout) == json.loads(json.dumps(plan_to_dict(plan)))
    assert "ended before" not in done.stderr and "\x1b" not in done.stderr and "\u2501" not in done.stderr


@pytest.mark.slow
def test_the_command_shows_a_table_and_says_with_3_that_runs_have_failed(learned, folder, tmp_path):
    out = shutil.copytree(folder / "out", tmp_path / "out")
    done = command(folder, out)
    assert done.returncode == 0 and "95 % interval" in done.stdout and "Written: " in done.stdout, done.stderr
    assert learned[0].curve.why in " ".join(done.stdout.split()) and "\x1b" not in done.stdout + done.stderr and "\u2501" not in done.stderr
    run = learned[0].results[0].run
    (out / "runs" / run.name / "summary.json").unlink()
    (out / "runs" / run.name / "failed.json").write_text(
        json.dumps({"message": "no such thing", "config": json.loads((out / "runs" / run.name / "config.json").read_text())})
    )
    done = command(folder, out, "--json")
    assert done.returncode == 3 and json.loads(done.stdout)["failed"] == 1, done.stderr


BAD = [
    (dict(sizes=["1/4", "x", "1"]), "--fractions: 'x' is no number"),
    (dict(sizes=["1/4", "2", "1"]), "--fractions: must be above 0 and at most 1, not 2"),
    (dict(sizes=["1/4", "1"]), "--fractions: must be 3 different ones at least"),
    (dict(sizes=["1/1000", "1/999", "1"]), "--fractions: of 96 rows some are the same number of rows"),
    (dict(seeds=0), "--seeds: must be at least 1"),
    (dict(seeds=1), "--seeds: 3 runs cannot tell noise from a curve"),
    (dict(metric="bleu"), "--metric: 'bleu' is no metric of the evaluation"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:32] for _, message in BAD])
def test_what_is_wrong_is_told_before_the_first_run(folder, changes, message):
    with pytest.raises(UserError) as error:
        planned(folder, **changes)
    assert message in str(error.value)


def test_steps_of_the_recipe_and_equal_epochs_contradict_each_other(folder):
    with pytest.raises(UserError, match="train.steps: is set, so runs would not make the same epochs"):
        plan_curve(tiny_recipe(folder), read_fractions(SIZES), 2, "epochs", None, lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=x", "--budget=days"], "error: flag --budget=days: value should be one of <epochs|steps>"),
        pytest.param([], "error: --workdir: is missing", marks=pytest.mark.slow),
    ],
)
def test_bad_input_of_the_command_is_one_message(folder, arguments, message):
    done = commands.run("learning_curve", "--config=configs/quickstart.py", *arguments, env=environment(1, folder / "xdg"), cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_runs_that_finish_without_a_finite_value_are_named():
    metric = Metric("held", "loss", True)
    losses = [0.5, 0.52, math.nan, 0.4, 0.3, None]
    results = [
        Result(SimpleNamespace(name=f"run {place}"), Path("run"), {"eval_last": {"held": {"loss": loss}}}, None, None) for place, loss in enumerate(losses)
    ]  # fmt: skip
    fractions = [Fraction(1, 4)] * 3 + [Fraction(1, 2), Fraction(1), Fraction(1)]
    rows = [25, 25, 25, 50, 100, 100]
    plan = SimpleNamespace(metric=metric, fractions=fractions, rows=rows, costs=[SimpleNamespace(steps=1, tokens=1)] * 6, whole=100)
    found = summarise(plan, results, [])
    assert found.curve is not None and len(found.levels[0].values) == 2
    assert found.notes == ["2 of 6 runs have finished with a held/loss that is no finite number, and do not count: run 2, run 5."]
