"""Best checkpoints and early stopping: the rule by itself, then runs."""

import json

import numpy as np
import pytest
from tiny_run import final_checksums, metrics, tiny_config

import sft_jax
from sft_jax import fit
from sft_jax.checkpoint.checkpoints import committed_steps, read_manifest
from sft_jax.config_parsing import parse_config
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.evaluation import evals
from sft_jax.training.best import Best

RAW = {"model": {"path": "m"}, "data": {"train": "t", "eval": "e"}, "eval": {"every": 1}}


def best_of(known=None, sets=None, generate=0, patience=0, **checkpoint):
    raw = {**RAW, "checkpoint": {"best": "loss", **checkpoint}, "train": {"patience": patience}, "eval": {"every": 1, "generate": generate}}
    if sets:
        raw["data"] = {"train": "t", "eval": sets}
    return Best(parse_config(raw), known)


def fed(best, values, name="eval", metric="loss"):
    for step, value in enumerate(values, 1):
        best.add(step, {name: {metric: value}})
    return best


def test_the_best_is_the_first_of_the_lowest():
    best = fed(best_of(keep_best=2), [3.0, 1.0, 2.0, 1.0, float("nan"), 5.0])
    assert best.step == 2 and best.steps == [2, 4] and str(best) == "step 2, eval loss 1.0000"
    assert not best.ended  # without patience never


@pytest.mark.parametrize(("metric", "mode", "step"), [("accuracy", "auto", 2), ("accuracy", "min", 1), ("loss", "max", 2), ("exact_match", "auto", 2)])
def test_which_is_better_is_the_metrics_or_what_is_said(metric, mode, step):
    assert fed(best_of(best=metric, best_mode=mode, generate=2), [0.1, 0.3, 0.2], metric=metric).step == step


def test_patience_counts_evaluations_since_the_best():
    best = best_of(patience=2)
    ended = []
    for step, value in enumerate([3.0, 2.0, 2.0, 1.0, 1.5, None], 1):
        best.add(step, {"eval": {"loss": value}})
        ended.append(best.ended)
    assert ended == [False] * 5 + [True]


def test_the_state_before_training_is_not_one_of_them():
    best = best_of()
    best.add(0, {"eval": {"loss": 0.1}})
    assert best.step is None


@pytest.mark.parametrize("cut", range(6))
def test_it_goes_on_from_its_state(cut):
    values = [3.0, 2.0, 2.5, 1.0, 1.5, 1.2]
    whole, part = (fed(best_of(keep_best=2, patience=3), values[:size]) for size in (6, cut))
    again = best_of(json.loads(json.dumps(part.state())), keep_best=2, patience=3)
    for step, value in enumerate(values, 1):  # those it knows change nothing
        again.add(step, {"eval": {"loss": value}})
    assert again.state() == whole.state() and again.ended == whole.ended
    other = best_of(part.state(), best="accuracy")
    assert other.step is None  # values of another metric are no values of this one


def test_a_metric_of_several_sets_names_its_set():
    sets = {"a": "x", "b/c": "y"}
    best = best_of(best="b/c/loss", sets=sets)
    best.add(1, {"a": {"loss": 1.0}, "b/c": {"loss": 2.0}})
    assert str(best) == "step 1, b/c loss 2.0000"
    for wrong, message in (("loss", "say of which, such as a/loss"), ("a/los", "did you mean 'a/loss'"), ("a/exact_match", "need eval.generate")):
        with pytest.raises(UserError, match=message):
            best_of(best=wrong, sets=sets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"checkpoint": {"best_mode": "max"}}, "checkpoint.best_mode: changes nothing"), ({"train": {"patience": 2}}, "train.patience: changes nothing"),
     ({"checkpoint": {"best": "loss"}, "train": {"patience": 2}, "eval": {"every": 0}}, "eval.every=0"),
     ({"checkpoint": {"best": "loss"}, "data": {"train": "t"}, "eval": {}}, "data.eval is empty"),
     ({"eval": {"scorers": ["numeric"]}}, "eval.generate=0"), ({"eval": {"generate": -2}}, "eval.generate"),
     ({"checkpoint": {"best": "loss", "keep_best": 0}}, "checkpoint.keep_best")],
)  # fmt: skip
def test_keys_that_change_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        parse_config({**RAW, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 3.2, 12: 1.0}  # what evaluations are made to say


def tell(monkeypatch):
    """Makes evaluations say LOSSES, so that which state is best is known."""
    evaluate = evals.Evaluator.__call__

    def told(self, state, step):
        results, records = evaluate(self, state, step)
        return {name: {**values, "loss": LOSSES.get(step, 9.0)} for name, values in results.items()}, records

    monkeypatch.setattr(evals.Evaluator, "__call__", told)


@pytest.fixture
def told(monkeypatch):
    tell(monkeypatch)


def config_of(folder, **changes):
    given = {"data__eval": str(folder / "held_out.jsonl"), "eval__every": 2, "checkpoint__every": 3, "checkpoint__keep": 1,
             "checkpoint__best": "loss", "train__patience": 3, "train__export": True, "train__steps": 14}  # fmt: skip
    return tiny_config(folder, **{**given, **changes})


@pytest.fixture(scope="module")
def ended(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tell(monkeypatch)
        summary = fit(config_of(folder), folder / "ended")
    return folder / "ended", summary


def test_a_run_ends_early_and_exports_its_best_state(folder, ended):
    """Best at step 4, which stays beside the newest, and is what the workdir stands for; evaluations 6, 8, 10 are no better."""
    workdir, summary = ended
    assert (summary["ended_early"], summary["steps"], summary["best"]["values"]) == (True, 10, {"4": 3.0})
    assert committed_steps(workdir / "checkpoints") == [4, 10]
    assert json.loads((workdir / "export" / "sft_jax.json").read_text())["steps"] == 4
    tokens = np.arange(24)[None] % 90
    logits = {name: np.asarray(sft_jax.load(place)[0](tokens)) for name, place in (("run", workdir), ("export", workdir / "export"))}
    np.testing.assert_allclose(logits["run"], logits["export"], atol=1e-5)
    arrays = read_manifest(workdir / "checkpoints" / "10")["arrays"]
    assert arrays != read_manifest(workdir / "checkpoints" / "4")["arrays"]


def test_a_run_that_ended_early_has_finished(folder, ended, told, capsys):
    workdir, summary = ended
    before = metrics(workdir)
    assert fit(config_of(folder), workdir) == json.loads((workdir / "summary.json").read_text())
    assert "raise train.patience to extend it" in capsys.readouterr().out and metrics(workdir) == before


@pytest.mark.slow
def test_stopped_and_continued_it_ends_the_same(folder, ended, told):
    workdir = folder / "stopped"
    for steps in (4, 3):  # right after the best evaluation, and between two
        with pytest.raises(StoppedBySignal):
            fit(config_of(folder, train__stop_after_steps=steps), workdir)
    summary = fit(config_of(folder), workdir)
    assert summary["best"] == ended[1]["best"] and summary["steps"] == 10 and summary["ended_early"]
    assert final_checksums(workdir) == final_checksums(ended[0]) and metrics(workdir) == metrics(ended[0])
    assert committed_steps(workdir / "checkpoints") == [4, 10]


@pytest.mark.slow
def test_with_more_patience_it_goes_on(folder, told):
    workdir = folder / "patient"
    fit(config_of(folder), workdir)
    summary = fit(config_of(folder, train__patience=4), workdir)
    assert (summary["steps"], summary["ended_early"], summary["best"]["values"]) == (14, False, {"12": 1.0})
    assert json.loads((workdir / "export" / "sft_jax.json").read_text())["steps"] == 12
    assert committed_steps(workdir / "checkpoints") == [12, 14]
