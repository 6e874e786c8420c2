"""A run of which files are missing, torn or of another shape is read as far as it goes, and what is not there is said."""

import json
import shutil

import pytest
from planted_runs import ROOT, edit_json, planted, said

from sft_jax.diagnosis.compare import compare, write_comparison
from sft_jax.diagnosis.diagnose import examine
from sft_jax.diagnosis.page import write_page
from sft_jax.diagnosis.run_files import read_run
from sft_jax.errors import UserError


def test_what_is_missing_or_torn_is_said(healthy, tmp_path):
    run = planted(healthy, tmp_path / "run")
    for name in ("summary.json", "manifest.json", "samples.jsonl"):
        (run / name).unlink()
    (run / "data_report.json").write_text('{"train": ')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "spl')
    shutil.rmtree(run / "export")
    report = examine(run, quick=True)
    notes = "\n".join(report.notes)
    for text in ("has not finished", "manifest.json is missing", "data_report.json cannot be read", "metrics.jsonl: 1 lines are torn"):
        assert text in notes
    assert not report.findings and report.run.steps > 0


SHAPES = {
    "summary.json": [[], 3, {"seconds": [1, 2]}, {"best": [4], "finished": True}, {"best": {"values": [4]}, "finished": True},
                     {"best": {"values": {"x": 1}}, "finished": True}, {"seconds": {"train": "long", "data": 1.0}}, {"steps": "many"}, {"mfu": "no", "steps": None}],
    "data_report.json": [[], {"train": []}, {"train": {"sets": []}}, {"train": {"sets": {"train": []}}, "eval": {"held_out": 3}}, {"eval": []},
                         {"train": {"sets": {"train": {"documents": "many", "over_length": [], "rows_left_out": 3, "tokens": None}}}}],
    "manifest.json": [[], {"fingerprints": []}, {"fingerprints": {"eval": ["x"]}}],
    "metrics.jsonl": [{"split": ["train"], "loss": 1.0}, {"split": "train", "loss": "low", "update_ratio": [1], "epoch": {}, "nonfinite_steps": "2", "learning_rate": True},
                      {"split": "held_out", "loss": "low", "exact_match": "yes", "slices": []}, {"split": "held_out"}, {}],
    "samples.jsonl": [{"generation": "x"}, {"set": ["a"], "generation": "x"}, {"set": "held_out", "example": {"line": 1}, "prompt": "p", "reference": "r", "generation": "x"},
                      {"set": "held_out", "example": [1, 2, 3], "prompt": "p", "reference": "r", "generation": "x"},
                      {"set": "held_out", "example": {"file": "f", "line": 1, "turn": -1}, "prompt": 3, "reference": "r", "generation": "x"},
                      {"set": "held_out", "example": {"turn": -1, "line": 1, "file": "f", "more": 1}, "prompt": "p", "reference": "r", "generation": "x", "bleu": "high"}],
}  # fmt: skip
SILENT = {"summary.json": [{"mfu": "no", "steps": None}, {"best": {"values": {"x": 1}}, "finished": True}],
          "metrics.jsonl": [{"split": ["train"], "loss": 1.0}, {"split": "held_out"}, {}]}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [pytest.param(name, value, id=f"{name}-{number}") for name, values in SHAPES.items() for number, value in enumerate(values)])
def test_json_of_another_shape_stops_nothing(healthy, tmp_path, name, value):
    run = planted(healthy, tmp_path / "run")
    if name.endswith(".json"):
        (run / name).write_text(json.dumps(value))
    else:
        with (run / name).open("a") as file:
            file.write(json.dumps({"step": 144, **value}) + "\n")
    report = examine(run, quick=True)
    said(report)
    write_page(tmp_path / "page.html", report)
    json.dumps(report.to_json(), allow_nan=False)
    comparison = compare(report, examine(healthy, quick=True))
    write_comparison(tmp_path / "both.html", comparison)
    silent = value in SILENT.get(name, ()) or name == "samples.jsonl" and "more" in value.get("example", ())
    assert any(name in note and "left out" in note for note in report.notes) != silent
    if name == "metrics.jsonl":
        assert len(report.run.curve("loss").steps) == len(read_run(healthy).curve("loss").steps)


def test_rows_that_have_gone_are_a_note(healthy, tmp_path):
    run = planted(healthy, tmp_path / "run")
    edit_json(run / "config.json", lambda config: config["data"]["train"][0].update(path=[str(tmp_path / "gone.jsonl")]))
    report = examine(run)
    assert not report.findings
    assert any("The data were not looked at" in note and "gone.jsonl" in note for note in report.notes)


@pytest.mark.parametrize("make", ["nothing", "empty", "model"])
def test_a_folder_that_is_no_run_is_one_message(tmp_path, make):
    folder = tmp_path / "folder"
    if make == "empty":
        folder.mkdir()
    elif make == "model":
        shutil.copytree(ROOT / "models/nano", folder)
    with pytest.raises(UserError, match="there is no such folder" if make == "nothing" else "is no run"):
        examine(folder)
