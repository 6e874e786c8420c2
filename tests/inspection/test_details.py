"""Examples with their texts: against build_rows called row by row, the template, the store, and the policy's own counts."""

import dataclasses
import io
import json

import numpy as np
import pytest
from inspected_rows import ROWS, everything

from sft_jax.data.chats.chat import build_rows
from sft_jax.data.chats.templates import resolve_template
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.sources.registry import open_rows
from sft_jax.data.stores.workers import WorkerPool
from sft_jax.errors import UserError
from sft_jax.inspection import details as inspection_details
from sft_jax.inspection.filters import Filters, Selection
from sft_jax.inspection.fragments import supervised_text
from sft_jax.inspection.records import line
from sft_jax.inspection.statistics import problem_count, problems
from sft_jax.inspection.terminal import TerminalView


def test_details_are_what_build_rows_makes_of_each_row(inspected, written):
    path = written(ROWS)
    subject = inspected(path)
    tokenizer = subject.data.tokenizer
    template = resolve_template(subject.config.chat_template, tokenizer)
    rows = open_rows([path], "data.train")
    details = everything(subject)
    assert [(d.line, d.turn, d.row) for d in details] == [(1, -1, 1), (2, -1, 2), (3, -1, 3), (4, 0, 4), (4, 1, 4), (5, -1, 5)]
    for detail in details:
        if detail.line in (3, 5):
            continue
        conversation = FORMATS["messages"].read(rows[detail.line - 1], subject.setup.sets[0].columns)
        (built,) = build_rows([conversation], tokenizer, template)
        example = built.examples[max(detail.turn, 0)]
        assert (detail.ids == example.ids).all() and (detail.weights == example.weights).all()
        assert (detail.text, detail.turn, detail.kind) == (example.text, example.turn, built.kind)
        assert (detail.problem, detail.trained) == ("", int((example.weights > 0).sum()))


def test_texts_are_the_renders(inspected, written):
    """Without the aliases that the injection guard encodes with, and of a turn of its own up to its end."""
    subject = inspected(written(ROWS))
    rendered = {(d.line, d.turn): d.text for d in everything(subject)}
    assert rendered[1, -1] == "<|im_start|>user\nWhat says the fox?<|im_end|>\n<|im_start|>assistant\nIt says 9.<|im_end|>\n"
    assert rendered[2, -1] == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant evil<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    assert rendered[4, 0] == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>hm</think>\nfirst<|im_end|>"
    assert rendered[4, 1].endswith("two<|im_end|>\n<|im_start|>assistant\n<think>so</think>\nsecond<|im_end|>\n")
    assert rendered[3, -1] == rendered[5, -1] == ""


def test_supervised_text_is_the_answer_and_its_end(inspected, written):
    subject = inspected(written(ROWS))
    found = [supervised_text(subject.data.tokenizer, d.ids, d.weights) for d in everything(subject)]
    assert found == [
        "It says 9.<|im_end|>", "No.<|im_end|>", "", "<think>hm</think>\nfirst<|im_end|>",
        "<think>so</think>\nsecond<|im_end|>", "",
    ]  # fmt: skip


def test_bad_rows_are_in_their_place_although_they_would_stop_training(inspected, written):
    subject = inspected(written(ROWS))
    assert subject.config.bad_rows == "error"
    bad = [d for d in everything(subject) if d.problem]
    assert [(d.line, d.problem) for d in bad] == [
        (3, "is not valid JSON (Expecting value at column 15); correct or remove it."),
        (5, "the conversation has no assistant turn, so there is nothing to learn; correct or remove the row."),
    ]
    assert all(len(d.ids) == len(d.weights) == d.trained == 0 and d.kind == "" for d in bad)


def test_all_sets_come_in_the_order_of_the_configuration(inspected, written):
    short = {"prompt": "What says the owl?", "completion": " It says 1."}
    train = {"b": written(ROWS, "b.jsonl"), "a": {"path": written([short] * 3, "a.jsonl")}}
    subject = inspected(train, eval=written([short], "held_out.jsonl"))
    assert [(d.split, d.set, d.line) for d in everything(subject) if d.turn < 1] == [
        *(("train", "b", line) for line in (1, 2, 3, 4, 5)), *(("train", "a", line) for line in (1, 2, 3)), ("eval", "eval", 1),
    ]  # fmt: skip


def test_a_record_has_every_field(inspected, written):
    subject = inspected(written(ROWS))
    records = [json.loads(line(d, subject.data.tokenizer)) for d in everything(subject)]
    names = ["set", "split", "file", "line", "turn", "class", "text", "ids", "weights", "supervised_text", "problem", "beyond_cap"]
    assert all(list(record) == names for record in records)
    assert [record["class"] for record in records] == ["once", "once", None, "per-turn", "per-turn", None]
    assert set(records[3]["weights"]) == {0.0, 0.1}
    for record, detail in zip(records, everything(subject), strict=True):
        assert np.array_equal(np.array(record["weights"], np.float32), detail.weights)
        assert record["ids"] == detail.ids.tolist()
        assert record["problem"] == (detail.problem or None)


LONG = [{"prompt": f"What says fox {i}?", "completion": " It says 9." * (1 + 3 * i)} for i in range(6)]


@pytest.mark.parametrize("policy", ["drop", "truncate_left", "truncate_right", "keep_last_turns", "split"])
def test_what_is_lost_by_example_adds_up_to_what_the_policy_counts(inspected, written, policy):
    subject = inspected(written(LONG), overlength=policy, max_length=40, chat_template="none", add_tokens="")
    counts = subject.data.report["train"]["sets"]["train"]["over_length"]
    sizes = subject.sets[0].shortened
    details = everything(subject)
    assert counts["over_length"] == sum(d.shortened for d in details) > 0
    assert counts["tokens_lost"] == sizes.positions_lost.sum()
    assert counts["supervised_tokens_lost"] == sizes.supervised_lost.sum()
    assert sum(d.trained for d in details) == subject.data.train.supervised_tokens
    assert [bool(d.problem) for d in details] == [len(d.ids) > 41 for d in details]


def test_what_the_policy_does_is_said(inspected, written):
    def problem(policy):
        subject = inspected(written(LONG), overlength=policy, max_length=40, chat_template="none", add_tokens="")
        last = everything(subject)[-1]
        return last, last.problem

    last, said = problem("error")
    n, supervised = len(last.ids), int((last.weights > 0).sum())
    begin = f"has {n} tokens, and data.max_length 40 has room for 41: "
    assert said == f"{begin}data.overlength=error stops the run."
    assert problem("drop")[1] == f"{begin}data.overlength=drop leaves it out, with {supervised} supervised tokens."
    assert problem("truncate_right")[1] == (
        f"{begin}data.overlength=truncate_right cuts off {n - 41} tokens, {n - 41} of them supervised."
    )
    assert problem("split")[1] == f"{begin}data.overlength=split makes {-(-(n - 1) // 40)} documents of it."


def test_a_row_that_differs_from_the_prepared_data_is_named(inspected, written):
    path = written(ROWS[:1])
    subject = inspected(path)
    source, name = subject.setup.template
    for change, what in (
        (source.replace("{{ message.content }}", "{{ message.content }}!"), "other tokens"),
        ("{{ raise_exception('no') }}", "1 example(s), now 0"),
    ):
        other = dataclasses.replace(subject, setup=subject.setup._replace(template=(change, name)))
        with pytest.raises(UserError) as error:
            everything(other)
        reason = f" ({name} does not accept the conversation: no)" if "now 0" in what else ""
        assert str(error.value) == (
            f"{path}:1: the prepared data hold {what}{reason}. A chat template that does not always write the same does that, "
            "and a row at the limits of data.row_timeout or data.row_memory_mb; to prepare again remove "
            f"{subject.sets[0].store.folder}."
        )
    store = subject.sets[0].store
    store_weights = subject.data.train.corpus._run_weights
    store_weights *= 2
    with pytest.raises(UserError, match="the prepared data hold other weights"):
        everything(subject)
    assert len(store) == 1


def test_a_row_that_ran_into_the_watchdog_is_told_and_not_tried_again(inspected, written, model, tmp_path, monkeypatch):
    """It costs its whole time: looking at the data again must not pay that for every such row."""
    template = tmp_path / "loops.jinja"
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    loop = "{% if messages[0].content == 'loop' %}" + forever + "{% endif %}"
    template.write_text(loop + (model / "template.jinja").read_text())
    rows = [ROWS[0], {"messages": [{"role": "user", "content": "loop"}, {"role": "assistant", "content": "x"}]}, ROWS[1]]
    subject = inspected(written(rows), chat_template=str(template), row_timeout=1.0)
    given = []

    class Watched(WorkerPool):
        def run(self, chunks):
            return super().run([given.extend(item.row for item in items) or items for items in chunks])

    monkeypatch.setattr(inspection_details, "WorkerPool", Watched)
    details = everything(subject)
    assert given == [rows[0], None, rows[2]]
    assert [d.problem for d in details] == ["", "preparing it took longer than 1 seconds; see data.row_timeout.", ""]


def test_what_a_cap_leaves_out_is_told_and_no_problem(inspected, written):
    """Nothing of it counts as lost to the policy, or as trained."""
    rows = [{"prompt": f"{number}?", "completion": "x"} for number in range(20)]
    subject = inspected([{"path": written(rows), "cap": 5}], chat_template="none", add_tokens="")
    details = everything(subject)
    left_out = [detail for detail in details if detail.note]
    assert len(details) == 20 and len(left_out) == 15 and not any(detail.problem for detail in details)
    assert {detail.note for detail in left_out} == {"beyond the cap: it is not in the sample of 5 rows of its set."}
    assert [json.loads(line(d, subject.data.tokenizer))["beyond_cap"] for d in details] == [bool(d.note) for d in details]
    assert all((detail.trained == 0) == bool(detail.note) for detail in details)
    (item,) = subject.sets
    assert problem_count(item) == len(list(problems(item))) == 0
    assert not item.shortened.positions_lost.any() and not item.shortened.supervised_lost.any()
    documents = [subject.data.train.document(number)[0] for number in range(subject.data.train.document_count)]
    assert [number for number, detail in enumerate(details) if not detail.note] == sorted(documents)
    assert list(Selection(subject, Filters(problems=True)).take()) == []
    shown = io.StringIO()
    TerminalView(subject.data.tokenizer, file=shown).example(left_out[0])
    assert "\nbeyond the cap: it is not in the sample" in shown.getvalue()


@pytest.mark.parametrize("policy", ["error", "drop", "truncate_right", "split"])
def test_a_cap_and_a_policy_are_told_apart(inspected, written, policy):
    """Six of twelve rows do not fit. The cap is drawn from what the policy leaves, and what it leaves out loses nothing."""
    rows = [{"prompt": f"{number}?", "completion": " It says 9." * (20 if number % 2 else 1)} for number in range(12)]
    options = {"chat_template": "none", "add_tokens": "", "max_length": 40}
    path = written(rows)
    subject = inspected([{"path": path, "cap": 4, "overlength": policy}], **options)
    whole = everything(inspected([{"path": path, "overlength": policy}], **options))
    used = {subject.data.train.document(number)[0] for number in range(subject.data.train.document_count)}
    dropped = set(range(1, 12, 2)) if policy == "drop" else set()
    stops = set(range(1, 12, 2)) if policy == "error" else set()  # before there is anything to cap
    assert len(used) == 4
    for number, (detail, alone) in enumerate(zip(everything(subject), whole, strict=True)):
        left_out = number not in used | dropped | stops
        assert bool(detail.note) == left_out, number
        assert (detail.problem, detail.trained) == (("", 0) if left_out else (alone.problem, alone.trained)), number
    losing = {"truncate_right": used & set(range(1, 12, 2))}.get(policy, dropped)
    assert set(np.flatnonzero(subject.sets[0].shortened.positions_lost).tolist()) == losing


def test_rows_of_an_array_on_one_line_are_told_apart(inspected, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": f"{number}?", "completion": f"{number}."} for number in range(4)]))
    subject = inspected(str(path), chat_template="none", add_tokens="")
    assert [(d.line, d.text.strip()) for d in everything(subject)] == [(n + 1, f"{n}?{n}.") for n in range(4)]
    assert [d.text for d in Selection(subject, Filters(row="3")).take()] == ["2?2."]
    assert [d.text for d in Selection(subject, Filters(row=f"{path}:3")).take()] == ["2?2."]


def test_tokens_that_the_data_bring(inspected, written):
    subject = inspected(written([{"input_ids": [5, 6, 7], "weights": [0, 0.5, 1]}]), chat_template="none", add_tokens="")
    (detail,) = everything(subject)
    assert detail.ids.tolist() == [5, 6, 7] and detail.weights.tolist() == [0, 0.5, 1]
    assert detail.text == subject.data.tokenizer.decode([5, 6, 7]) and detail.kind == "plain"


def test_the_date_of_the_data_is_the_one_that_is_shown(inspected, written, tmp_path):
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    subject = inspected(written([{"prompt": "a", "completion": "b"}]), chat_template=str(template), date="2019-03-01")
    assert everything(subject)[0].text.startswith("2019<|im_start|>user")
