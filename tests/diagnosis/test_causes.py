"""Every cause is named first where it was planted, and none in a sound run.

Faults are written into copies of a run that was trained, in the form in which a run writes them; test_trained_causes.py trains
those that a run makes by itself.
"""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from planted_runs import edit_json, edit_lines, noise, planted, rows_of, said, write_rows

from sft_jax.config_parsing import parse_config
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.diagnosis import needs, result_causes
from sft_jax.diagnosis.causes import CAUSES
from sft_jax.diagnosis.diagnose import examine
from sft_jax.diagnosis.finding import Divergence, Evidence, Measured, TextLoss
from sft_jax.diagnosis.page import causes_section, write_page
from sft_jax.diagnosis.run_files import read_run
from sft_jax.training.export import _tokenizer


def causes(run, **options):
    return list(examine(run, **options).findings)


@pytest.mark.slow
def test_a_sound_run_has_no_cause(healthy):
    report = examine(healthy)
    assert list(report.not_looked_for) == ["export_differs", "over_fitting", "forgetting"]  # which take models, and evaluations on the way
    assert not report.findings
    assert not [note for note in report.notes if "cannot" in note or "missing" in note]
    assert report.evidence.data is not None and report.ledger is not None
    found = report.to_json()
    assert json.loads(json.dumps(found, allow_nan=False))["causes"] == []
    records = [json.loads(line) for line in (healthy / "metrics.jsonl").read_text().splitlines()]
    held_out = [record for record in records if record["split"] == "held_out"]
    assert found["losses"]["held_out"]["first"] == held_out[0]["loss"] and found["losses"]["held_out"]["last"] == held_out[-1]["loss"]
    ratios = [record["update_ratio"] for record in records if record["split"] == "train" and record["learning_rate"]]
    assert 1e-5 < np.median(ratios) < 0.1


def of_training(change):
    """An edit of training records, given the record, its share of the steps, and a number that is noise."""

    def edit(run):
        last = max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
        edit_lines(
            run / "metrics.jsonl",
            lambda record: change(record, record["step"] / last, noise(record["step"], 0.01)) if record["split"] == "train" else None,
        )

    return edit


def first_loss(run):
    edit_lines(run / "metrics.jsonl", lambda record: record.update(loss=7.2) if record["step"] == 0 else None)


def supervised(share):
    """An edit after which so many of the targets are supervised."""

    def change(report):
        found = report["train"]["sets"]["train"]
        found.update(supervised_tokens=round(share * (found["tokens"] - found["examples"])))

    return lambda run: edit_json(run / "data_report.json", change)


def few_tokens(run):
    edit_json(run / "data_report.json", lambda report: report["train"]["sets"]["train"].update(documents=30, used_supervised_tokens=700))


def other_data(rows):
    """An edit that gives the run other training rows, as if they had been those."""

    def edit(run):
        path = write_rows(run / "rows.jsonl", rows)
        edit_json(run / "config.json", lambda config: config["data"]["train"][0].update(path=[path]))

    return edit


def other_template(run):
    (run / "export" / "chat_template.jinja").write_text((run / "export" / "chat_template.jinja").read_text().replace("<|assistant|>", "Answer:"))


def old_export(run):
    edit_json(run / "export" / "sft_jax.json", lambda values: values.update(steps=values["steps"] - 8))


LONG_ROWS = [
    {"messages": [{"role": "user", "content": " ".join(f"item {number} of list {row} is {number * row % 7}" for number in range(12))},
                  {"role": "assistant", "content": f"list {row} has twelve items"}]} for row in range(1, 31)
]  # fmt: skip


def nearly(rows):
    """The rows, and each once more with a word of its prompt changed."""
    changed = json.loads(json.dumps(rows))
    for row in changed:
        row["messages"][0]["content"] = row["messages"][0]["content"].replace("item 5 ", "part 5 ")
    return rows + changed


diverged = of_training(lambda record, share, noise: record.update(loss=5.0 - 8 * share + noise if share < 0.5 else 1 + 6 * (share - 0.5) + noise))
jumped = of_training(lambda record, share, noise: record.update(loss=5.8 if share < 0.04 else 4 + 16 * (1 - share) ** 4 + noise))
not_finite = of_training(lambda record, share, noise: record.update(nonfinite_steps=1.0) if 0.2 < share < 0.25 else None)
giant_steps = of_training(lambda record, share, noise: record.update(update_ratio=0.4 * (1 - share)))
still = of_training(lambda record, share, noise: record.update(loss=5.8 + noise, update_ratio=2e-7))
falling = of_training(lambda record, share, noise: record.update(loss=5.0 - 4 * share + noise))


def over_fitted(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])
    middle = len(lines) // 3
    best = {**last, "step": json.loads(lines[middle])["step"], "loss": 0.3}
    lines[-1] = json.dumps({**last, "loss": 0.8}) + "\n"
    (run / "metrics.jsonl").write_text("".join([*lines[: middle + 1], json.dumps(best) + "\n", *lines[middle + 1 :]]))


def evaluated_on_the_way(*losses):
    """An edit that puts evaluations between the first and the last one, as eval.every makes them."""

    def edit(run):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in records if record["split"] == "train"]
        last = next(record for record in reversed(records) if record["split"] == "held_out")
        for place, loss in enumerate(losses, 1):
            step = steps[place * (len(steps) - 1) // (len(losses) + 1)]
            records.append({**last, "step": step, "loss": loss, "exact_match": 0.5})
        write_rows(run / "metrics.jsonl", sorted(records, key=lambda record: record["step"]))

    return edit


def learnt_by_heart(run, train=0.008, held_out=0.658, epochs=16.0):
    """What a run shows that was evaluated at its ends alone."""
    of_training(lambda record, share, noise: record.update(epoch=epochs * share, loss=train + 4 * max(0.4 - share, 0) + noise * train))(run)
    edit_lines(run / "metrics.jsonl", lambda record: record.update(loss=held_out) if record["split"] != "train" and record["step"] else None)


def of_the_best(step, metric="loss"):
    """An edit after which the run has finished with checkpoint.best, and that step was the best."""

    def edit(run):
        edit_json(run / "config.json", lambda config: (config["checkpoint"].update(best=metric), config["eval"].update(every=30)))
        edit_json(run / "summary.json", lambda summary: summary.update(best={"set": "held_out", "metric": metric, "values": {str(step): 0.3}}))
        edit_json(run / "export" / "sft_jax.json", lambda values: values.update(steps=step))

    return edit


def unended(run):
    edit_lines(run / "samples.jsonl", lambda sample: sample.update(finished=False, generation=sample["generation"] + " and so on" * 9))


def cut_rows(run):
    def change(report):
        report["train"]["sets"]["train"]["over_length"].update(policy="truncate_right", over_length=90, cut=90, tokens_lost=2000, supervised_tokens_lost=1500)

    edit_json(run / "data_report.json", change)


PLANTED = {
    "first_loss": [first_loss],
    "mask_share": [pytest.param(supervised(1.0), id="all"), pytest.param(supervised(0.002), id="hardly")],
    "few_tokens": [few_tokens],
    "duplicates_or_leakage": [
        pytest.param(other_data(rows_of("train.jsonl", 400) + rows_of("held_out.jsonl", 24)), id="leaked"),
        pytest.param(other_data(rows_of("train.jsonl", 200) * 2), id="repeated", marks=pytest.mark.slow),
        pytest.param(other_data(rows_of("train.jsonl", 100) + nearly(LONG_ROWS)), id="nearly-repeated", marks=pytest.mark.slow),
    ],
    "template": [other_template],
    "export_differs": [old_export],
    "learning_rate_too_high": [pytest.param(diverged, id="diverged"), pytest.param(jumped, id="jumped"), pytest.param(not_finite, id="skipped"), pytest.param(giant_steps, id="giant")],
    "learning_rate_too_low": [pytest.param(still, id="still")],
    "over_fitting": [over_fitted, learnt_by_heart],
    "under_training": [pytest.param(falling, id="falling")],
    "truncated_answers": [unended, cut_rows],
}


def cases():
    for cause, edits in PLANTED.items():
        for edit in edits:
            edit = edit if hasattr(edit, "values") else pytest.param(edit, id=edit.__name__)
            yield pytest.param(cause, *edit.values, id=f"{cause}-{edit.id}", marks=edit.marks)


OF_DATA = ("duplicates_or_leakage", "template")  # what --quick does not look at


def test_every_cause_is_planted():
    assert {*PLANTED, "forgetting"} == {*CAUSES}  # that one needs models, see test_measure


@pytest.mark.parametrize(("cause", "edit"), list(cases()))
def test_a_planted_cause_is_named_first(healthy, tmp_path, cause, edit):
    run = planted(healthy, tmp_path / "run")
    edit(run)
    assert causes(run, quick=cause not in OF_DATA)[0] == cause


@pytest.mark.parametrize("exported", ["by an earlier version", "with defaults"])
def test_arguments_of_the_template_that_servers_are_not_told_are_named(healthy, tmp_path, exported):
    run = planted(healthy, tmp_path / "run")
    source = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}{{ ' think' if think is not defined or think else '' }}{% endif %}"
    (tmp_path / "thinks.jinja").write_text(source)
    arguments = {"think": False}
    edit_json(run / "config.json", lambda config: config["data"].update(chat_template=str(tmp_path / "thinks.jinja"), chat_template_kwargs=arguments))
    trained = parse_config(json.loads((run / "config.json").read_text()))
    tokenizer, _ = _tokenizer(trained, SimpleNamespace(tokenizer=load_tokenizer(healthy / "export")))  # as a run exports it
    template = source if exported == "by an earlier version" else tokenizer.chat_template
    (run / "export" / "chat_template.jinja").write_text(template)
    found = examine(run).findings
    if exported == "with defaults":
        assert "template" not in found
        return
    assert "What is the time?'" in found["template"].says and "think'" in found["template"].says
    assert found["template"].evidence["data.chat_template_kwargs"] == '{"think": false}' and 'chat_template_kwargs of the run with each request: {"think"' in found["template"].remedy


def test_evidence_is_what_was_planted(healthy, tmp_path):
    run = planted(healthy, tmp_path / "run")
    first_loss(run)
    unended(run)
    report = examine(run, quick=True)
    assert list(report.findings) == ["first_loss", "truncated_answers"]
    assert report.findings["first_loss"].evidence["first_loss"] == 7.2
    assert report.findings["first_loss"].evidence["uniform_loss"] == pytest.approx(np.log(1024))
    answers = report.findings["truncated_answers"].evidence
    assert (answers["ended"], answers["answers"]) == (0, 12) and answers["repeating"] > 0


@pytest.mark.parametrize(
    ("train", "held_out", "epochs", "named"),
    [(0.008, 0.658, 16.0, True), (0.008, 0.658, 1.0, False), (0.3, 0.658, 16.0, False), (0.008, 0.2, 16.0, False), (0.05, 0.7, 2.0, True)],
    ids=["by heart", "one epoch", "twice the loss", "a small loss", "two epochs"],
)  # fmt: skip
def test_a_held_out_loss_far_above_that_of_rows_that_came_up_often_is_named(healthy, tmp_path, train, held_out, epochs, named):
    run = planted(healthy, tmp_path / "run")
    learnt_by_heart(run, train, held_out, epochs)
    found = examine(run, quick=True)
    assert ("over_fitting" in found.findings) == named and ("over_fitting" in found.not_looked_for) == (not named)
    if named:
        evidence = found.findings["over_fitting"].evidence
        assert (evidence["last_loss"], evidence["epochs"]) == (held_out, epochs) and evidence["training_loss"] == pytest.approx(train, rel=0.1)


def test_a_held_out_loss_that_was_seen_to_fall_to_the_end_is_no_over_fitting(healthy, tmp_path):
    run = planted(healthy, tmp_path / "run")
    evaluated_on_the_way(0.9, 0.8)(run)
    learnt = of_training(lambda record, share, noise: record.update(loss=0.008 + 4 * max(0.4 - share, 0)))
    learnt(run)
    edit_lines(run / "metrics.jsonl", lambda record: record.update(loss=0.658) if record["step"] == 144 and record["split"] != "train" else None)
    report = examine(run, quick=True)
    assert "over_fitting" in report.looked_for and not report.findings


@pytest.mark.parametrize(("metric", "chosen", "named"), [("loss", "at its best", False), ("exact_match", "later", True), ("held_out/loss", "at its best", False)])
def test_the_best_state_is_judged_where_the_run_exports_it(healthy, tmp_path, metric, chosen, named):
    run = planted(healthy, tmp_path / "run")
    evaluated_on_the_way(0.4, 0.3, 0.7)(run)
    edit_lines(run / "metrics.jsonl", lambda record: record.update(loss=0.9) if record["step"] == 144 and record["split"] != "train" else None)
    report = examine(run, quick=True)
    assert report.findings["over_fitting"].evidence["last_loss"] == 0.9 and report.run.result_step == 144
    curve = report.run.eval_curve("held_out")
    step = int(curve.steps[2 if chosen == "at its best" else 3])
    of_the_best(step, metric)(run)
    edit_lines(run / "samples.jsonl", lambda sample: sample.update(step=step if sample["step"] else 0))
    with (run / "samples.jsonl").open("a") as file:  # the last answers, which are not those of the result
        file.write(json.dumps({"step": 144, "set": "held_out", "example": {"file": "f", "line": 1, "turn": -1}, "prompt": "p", "reference": "r", "generation": "x"}) + "\n")
    report = examine(run, quick=True)
    assert list(report.findings) == (["over_fitting"] if named else [])
    if named:
        found = report.findings["over_fitting"]
        assert found.evidence["last_loss"] == 0.7 and "checkpoint.best=loss" not in found.remedy and "checkpoint.best=exact_match" in found.remedy
    assert report.evidence.health["held_out"].step == step and report.evidence.health["held_out"].answers == 12
    found = report.to_json()
    assert found["losses"]["held_out"]["result"] == (0.7 if named else 0.3) and found["losses"]["held_out"]["last"] == 0.9
    assert found["result_step"] == step and f"step {step}, the result" in said(report)
    assert any(f"state of step {step}" in note and "checkpoint.best" in note for note in report.notes)
    write_page(tmp_path / "page.html", report)
    assert f"step {step}, the result" in (tmp_path / "page.html").read_text()


def test_a_best_state_that_was_evaluated_first_is_at_its_best(healthy, tmp_path):
    run = planted(healthy, tmp_path / "run")
    learnt_by_heart(run)
    evaluated_on_the_way(0.6, 0.65, 0.66)(run)
    edit_lines(run / "metrics.jsonl", lambda record: record.update(loss=0.008 if record["step"] > 8 else 5.0, epoch=record["step"] / 9) if record["split"] == "train" else None)
    of_the_best(int(read_run(run).eval_curve("held_out").steps[1]))(run)
    assert "over_fitting" not in examine(run, quick=True).findings


def test_a_best_state_that_is_the_untrained_one_is_judged_by_what_followed(healthy, tmp_path):
    run = planted(healthy, tmp_path / "run")
    edit_lines(run / "metrics.jsonl", lambda record: record.update(loss=6.9) if record["split"] != "train" and record["step"] else None)
    of_the_best(0)(run)
    report = examine(run, quick=True)
    assert list(report.findings)[0] == "over_fitting" and "export_differs" not in report.findings
    assert report.findings["over_fitting"].remedy.startswith("Fewer train.epochs")


def test_a_run_whose_best_state_is_an_earlier_one_did_not_end_too_early(healthy, tmp_path):
    run = planted(healthy, tmp_path / "run")
    falling(run)
    evaluated_on_the_way(0.4, 0.3, 0.5)(run)
    assert "under_training" in examine(run, quick=True).findings
    edit_lines(run / "metrics.jsonl", lambda record: record.update(loss=0.35) if record["step"] == 144 and record["split"] != "train" else None)
    of_the_best(int(read_run(run).eval_curve("held_out").steps[2]))(run)
    assert "under_training" not in examine(run, quick=True).findings


OF_MORE_THAN_FILES = {"duplicates_or_leakage": "data", "template": "templates", "export_differs": "models", "forgetting": "models"}


def test_what_was_not_looked_for_is_said_with_the_reason(healthy, tmp_path):
    assert "eval.every: a rise shows in 3 or more evaluations after step 0, and the log has 1" in examine(healthy, quick=True).not_looked_for["over_fitting"]
    sound = planted(healthy, tmp_path / "sound")
    evaluated_on_the_way(1.0, 0.5)(sound)
    report = examine(sound, quick=True)
    found = report.to_json()
    assert {name: why.split()[-1] for name, why in found["not_looked_for"].items()} == OF_MORE_THAN_FILES
    assert sorted([*found["looked_for"], *found["not_looked_for"]]) == sorted(CAUSES) and len(found["looked_for"]) == 8
    text = said(report)
    assert "No cause was found among 8 of 12; not looked for: " in text and "export_differs, forgetting (--quick leaves out models)" in text
    page = causes_section(report)
    assert "None was found. Looked for: first_loss, mask_share" in page and "Not looked for: " in page and "template (--quick leaves" in page
    run = planted(healthy, tmp_path / "run")
    old_export(run)  # is found by its step, so it was looked for
    report = examine(run, quick=True)
    assert "export_differs" in report.looked_for and "export_differs" not in report.not_looked_for
    text = said(report)
    assert "No cause" not in text and "Not looked for: " in text
    assert "Also looked for: first_loss" in causes_section(report)


def without_training(run):
    edit_lines(run / "metrics.jsonl", lambda record: record.update(split="other") if record["split"] == "train" else None)


def short_log(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:6]))


LACKS = {
    "no evaluation": (lambda run: edit_lines(run / "metrics.jsonl", lambda record: record.update(split="train") if record["split"] != "train" else None),
                      {"over_fitting": "no held-out set was evaluated (data.eval)"}),
    "few records": (short_log, {"learning_rate_too_high": "5 records of training, and 12 are needed", "under_training": "5 records",
                                "over_fitting": "eval.every: a rise shows in 3 or more evaluations after step 0, and the log has 0"}),
    "an older run": (of_training(lambda record, share, noise: record.pop("update_ratio")), {"learning_rate_too_low": "no update_ratio"}),
    "no answers": (lambda run: (run / "samples.jsonl").unlink(), {"truncated_answers": "0 held-out prompts were answered, and 8"}),
    "no report": (lambda run: (run / "data_report.json").unlink(), dict.fromkeys(("mask_share", "few_tokens", "truncated_answers"), "data_report.json")),
    "no export": (lambda run: shutil.rmtree(run / "export"), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKS)
def test_a_cause_whose_evidence_is_not_there_is_not_looked_for(healthy, tmp_path, case):
    edit, expected = LACKS[case]
    run = planted(healthy, tmp_path / "run")
    evaluated_on_the_way(1.0, 0.5)(run)
    edit(run)
    found = {name: why for name, why in examine(run, quick=True).not_looked_for.items() if name not in OF_MORE_THAN_FILES}
    assert found.keys() == expected.keys()
    assert all(text in found[name] for name, text in expected.items()), found


@pytest.fixture(scope="module")
def files(healthy):
    return read_run(healthy)


@pytest.mark.parametrize(
    ("kl", "moved", "named"),
    [(0.0101, 5.0, True), (0.0099, 5.0, False), (0.0099, 0.0150, True), (0.00101, 0.0020, True), (0.00099, 0.0010, False), (0.0050, 0.0101, False),
     (0.0050, 0.0099, True), (0.0101, None, True), (0.0099, None, False)],
)  # fmt: skip
def test_thresholds_of_an_export_that_differs(files, kl, moved, named):
    """0.01 nats a token; or 0.001 and half of the way that training has gone."""
    measured = Measured(export=Divergence(kl, 1e-4, 400), from_base=None if moved is None else Divergence(moved, 1e-3, 400))
    assert bool(result_causes.export_differs(Evidence(files, measured=measured))) == named


def loss(base, tuned, low, high):
    return TextLoss(base, tuned, None if low is None else (low, high), 16, 700)


KNOWN = math.log(1024) - 0.5  # what a base with a loss of 0.5 on its own texts knows of them


@pytest.mark.parametrize(
    ("measured", "named"),
    [
        pytest.param(Measured(general=loss(2.0, 2.22, 0.1, 0.3)), True, id="forgotten"),
        pytest.param(Measured(general=loss(2.0, 2.10, 0.05, 0.15)), False, id="5 % more"),
        pytest.param(Measured(general=loss(2.0, 2.60, -0.1, 1.3)), False, id="around 0"),
        pytest.param(Measured(general=loss(2.0, 2.60, None, None)), False, id="one text"),
        pytest.param(Measured(general=loss(2.0, 2.0, None, None), own_samples=loss(0.5, 6.9, 6.2, 6.5)), True, id="one text, so the base's own decide"),
        pytest.param(Measured(general=loss(2.0, 1.5, -0.6, -0.4)), False, id="better"),
        pytest.param(Measured(general=loss(2.0, 2.0, -0.1, 0.1), own_samples=loss(0.5, 6.9, 6.2, 6.5)), False, id="the user's text decides"),
        pytest.param(Measured(own_samples=loss(0.54, 1.34, 0.6, 1.0), from_base=Divergence(1.8, 0.2, 431)), False, id="one task learnt"),
        pytest.param(Measured(own_samples=loss(0.5, 0.5 + 0.6 * KNOWN, 0.51 * KNOWN, 0.7 * KNOWN)), True, id="most lost"),
        pytest.param(Measured(own_samples=loss(0.5, 0.5 + 0.6 * KNOWN, 0.49 * KNOWN, 0.7 * KNOWN)), False, id="perhaps most lost"),
        pytest.param(Measured(own_samples=loss(7.0, 7.5, 0.4, 0.6)), False, id="a base that knew nothing"),
    ],
)
def test_what_is_forgotten_and_what_is_not(files, measured, named):
    found = result_causes.forgetting(Evidence(files, measured=measured))
    assert bool(found) == named
    assert ("too short" in needs.texts_of_the_base(Evidence(files, measured=measured))) == (measured.general is not None and measured.general.rise_interval is None)
    if found and measured.own_samples:
        assert found.evidence["tuned_loss"] == measured.own_samples.tuned and "--general" in found.remedy
