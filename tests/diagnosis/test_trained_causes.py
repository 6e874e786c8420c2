"""Faults that a training run makes by itself: every cause is named first where it was trained."""

import pytest
from planted_runs import rows_of, train, write_rows

from sft_jax.diagnosis.diagnose import examine


TRAINED = {
    "over_fitting": {"data__cap": 100, "train__epochs": 16.0, "eval__every": 30, "optim__schedule": "constant", "optim__learning_rate": 3e-3},
    "under_training": {"train__epochs": 0.6, "optim__schedule": "constant", "optim__learning_rate": 4e-5, "log__every": 1},
    "first_loss": {"model__init": "random", "train__epochs": 0.3},
    "mask_share": {"data__supervise": "all", "train__epochs": 0.3},
    "few_tokens": {"data__cap": 40, "train__epochs": 1.0},
    "learning_rate_too_high": {"optim__learning_rate": 0.5, "optim__clip_norm": 0.0, "log__every": 1, "train__epochs": 1.0, "train__nonfinite": "skip"},
    "learning_rate_too_low": {"optim__learning_rate": 1e-8, "log__every": 1, "train__epochs": 0.5},
    "truncated_answers": {"data__max_length": 56, "data__overlength": "truncate_right"},
}


@pytest.mark.slow
@pytest.mark.parametrize("cause", TRAINED)
def test_a_cause_that_was_trained_is_named_first(tmp_path, cause):
    changes = {"eval__generate": 8, **TRAINED[cause]}
    if cap := changes.pop("data__cap", 0):
        write_rows(tmp_path / "few.jsonl", rows_of("train.jsonl", cap))
        changes["data__train"] = str(tmp_path / "few.jsonl")
    found = list(examine(train(tmp_path, "run", **changes), quick=True).findings)
    assert found[0] == cause, found


@pytest.mark.slow
def test_an_over_fitted_run_that_exports_its_best_state_is_not_told_to(tmp_path):
    changes = {name: value for name, value in TRAINED["over_fitting"].items() if name != "data__cap"}
    path = write_rows(tmp_path / "few.jsonl", rows_of("train.jsonl", 100))
    report = examine(train(tmp_path, "run", data__train=path, checkpoint__best="loss", **changes), quick=True)
    assert 0 < report.run.result_step < report.run.steps
    assert "over_fitting" not in report.findings and "export_differs" not in report.findings
    assert report.evidence.health["held_out"].step == report.run.result_step


@pytest.mark.slow
def test_rows_that_were_learnt_by_heart_are_named_without_evaluations_on_the_way(tmp_path):
    changes = {name: value for name, value in TRAINED["over_fitting"].items() if name not in ("data__cap", "eval__every")}
    path = write_rows(tmp_path / "few.jsonl", rows_of("train.jsonl", 100))
    report = examine(train(tmp_path, "run", data__train=path, **changes), quick=True)
    assert next(iter(report.findings)) == "over_fitting" and len(report.run.eval_curve("held_out").steps) == 2
