"""Two runs beside each other."""

import io
import json

import numpy as np
import pytest
from planted_runs import edit_json, edit_lines, planted
from rich.console import Console

from sft_jax.diagnosis.compare import _tables, compare, comparison_text, write_comparison
from sft_jax.diagnosis.diagnose import examine


@pytest.fixture
def pair(healthy, tmp_path):
    """The sound run, and one with another learning rate whose answers are all right."""
    other = planted(healthy, tmp_path / "other")
    edit_json(other / "config.json", lambda config: config["optim"].update(learning_rate=1e-3))
    edit_json(other / "config.json", lambda config: config["data"]["train"][0].update(cap=400))
    edit_lines(other / "samples.jsonl", lambda sample: sample.update(exact_match=1.0))
    edit_lines(other / "metrics.jsonl", lambda record: record.update(loss=record["loss"] * 2) if record["split"] != "train" else None)
    return healthy, other


def test_keys_values_and_answers_that_differ_are_told(pair):
    comparison = compare(*(examine(run, quick=True) for run in pair))
    assert comparison.config == {"optim.learning_rate": (2e-3, 1e-3), "data.train.train.cap": (None, 400)}
    first, second = comparison.values["held_out", "loss"]
    assert second == pytest.approx(2 * first)
    samples = [json.loads(line) for line in (pair[0] / "samples.jsonl").read_text().splitlines()]
    last = [sample["exact_match"] for sample in samples if sample["step"] == max(sample["step"] for sample in samples)]
    found = comparison.answers["held_out", "exact_match"]
    assert found.mean == pytest.approx(1 - np.mean(last)) and found.prompts == len(last)
    assert found.interval is None or found.interval[0] <= found.mean <= found.interval[1]
    assert len(json.loads(json.dumps(comparison.to_json(), allow_nan=False))["runs"]) == 2


def test_the_table_of_same_prompts_says_that_it_has_means_over_answers(pair):
    """Of BLEU, chrF and fields of JSON the value of all answers together, in the table above, is another one."""
    assert "same prompts, mean over answers" in [head[0] for head, _ in _tables(compare(*(examine(run, quick=True) for run in pair)))]


def test_the_states_that_are_the_results_are_compared(healthy, tmp_path):
    other = planted(healthy, tmp_path / "other")
    records = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    middle = {**next(record for record in records if record["split"] == "held_out"), "step": 72, "loss": 0.05, "exact_match": 0.75}
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(middle) + "\n")
    edit_lines(other / "samples.jsonl", lambda sample: sample.update(exact_match=0.0))
    samples = [json.loads(line) for line in (other / "samples.jsonl").read_text().splitlines()]
    with (other / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps({**sample, "step": 72, "exact_match": 1.0}) + "\n" for sample in samples if sample["step"])
    edit_json(other / "config.json", lambda config: config["checkpoint"].update(best="loss"))
    edit_json(other / "summary.json", lambda summary: summary.update(best={"values": {"72": 0.05}}))
    comparison = compare(examine(healthy, quick=True), examine(other, quick=True))
    assert comparison.values["held_out", "loss"][1] == 0.05 and comparison.values["held_out", "exact_match"][1] == 0.75
    ours = [sample["exact_match"] for sample in map(json.loads, (healthy / "samples.jsonl").open()) if sample["step"]]
    assert comparison.answers["held_out", "exact_match"].mean == pytest.approx(1 - np.mean(ours))
    assert any("step 72" in note and "checkpoint.best=loss" in note for note in comparison.notes)


def test_other_rows_and_tokenizers_are_noted_and_that_no_prompt_is_shared(pair, tmp_path):
    assert compare(*(examine(run, quick=True) for run in pair)).notes == ()
    edit_json(pair[1] / "manifest.json", lambda manifest: manifest["fingerprints"].update(eval="other", tokenizer="other"))
    edit_lines(pair[1] / "samples.jsonl", lambda sample: sample["example"].update(file="elsewhere.jsonl"))
    comparison = compare(*(examine(run, quick=True) for run in pair))
    assert [note.split()[:4] for note in comparison.notes] == ["The held-out rows differ,".split(), "The tokenizers or their".split(), "No prompt was answered".split()]
    console = Console(width=300, file=io.StringIO())
    console.print(comparison_text(comparison))
    write_comparison(tmp_path / "page.html", comparison)
    for text in (console.file.getvalue(), (tmp_path / "page.html").read_text(), json.dumps(comparison.to_json())):
        assert all(note in text for note in comparison.notes)


def test_a_run_beside_itself_has_no_differences(healthy):
    report = examine(healthy, quick=True)
    comparison = compare(report, report)
    assert comparison.config == {} and all(first == second for first, second in comparison.values.values())
    assert all(found.mean == 0 for found in comparison.answers.values())


def test_the_page_has_both_curves(pair, tmp_path):
    path = tmp_path / "page.html"
    write_comparison(path, compare(*(examine(run, quick=True) for run in pair)))
    text = path.read_text()
    assert text.count('class="curve') == 4 + 4 * 2  # two losses of each run, and each of them in four other plots
    assert "optim.learning_rate" in text
