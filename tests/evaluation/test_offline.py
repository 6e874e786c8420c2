"""A model or a checkpoint evaluated by itself: the numbers are those of the run, and of each slice alone."""

import dataclasses
import json
import math

import numpy as np
import pytest
from tiny_run import make_rows, tiny_config

from sft_jax import fit
from sft_jax.config import parse_config
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.offline import Evaluation, Subject, evaluate_model
from sft_jax.evaluation.samples import Decoding
from sft_jax.hf.source import run_and_step
from sft_jax.model.sharding import make_mesh

SCORERS = ("exact_match", "token_f1", "choice:options", "choice_by_byte:options", "json_schema")


def with_columns(path):
    """Gives the rows of a file columns: a source, nested facts, choices that hold the answer, and a schema."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        answer = row["messages"][-1]["content"]
        row |= {"source": "ab"[number % 3 == 0], "facts": {"long": len(row["messages"]) > 2}, "number": number, "schema": {"type": "array"}}
        row["options"] = [answer, "rain", "noon train seven lamp"] if number % 2 else ["rain", answer]
        if answer == "rain":
            row["options"] = ["rain", "noon"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    tiny_config(folder)
    make_rows(folder / "held_out.jsonl", 30, seed=1)
    with_columns(folder / "held_out.jsonl")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A run that evaluates at steps 0, 2 and 4, with checkpoints of 2 and 4."""
    pytest.importorskip("jsonschema")
    config = tiny_config(
        folder, data__eval={"held": str(folder / "held_out.jsonl")}, eval__every=2, eval__generate=6, eval__scorers=list(SCORERS),
        eval__max_new_tokens=12, train__steps=4, train__export=True,
    )  # fmt: skip
    fit(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def config(run):
    return parse_config(json.loads((run / "config.json").read_text()), needs_data=False)


def evaluate(run, config, *, step=None, **rest) -> Evaluation:
    return evaluate_model(Subject(str(run), step), config, make_mesh(1, -1, 1), log=lambda line: None, **rest)


@pytest.fixture(scope="module")
def whole(run, config):
    return evaluate(run, dataclasses.replace(config, eval=dataclasses.replace(config.eval, generate=-1)), slices=("source", "facts.long"))


@pytest.mark.parametrize("step", [2, None])
def test_a_checkpoint_evaluates_to_what_the_run_said(run, config, step):
    found = evaluate(run, config, step=step).results["held"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (said,) = [record for record in records if record["split"] == "held" and record["step"] == (step or 4)]
    assert found.values() == pytest.approx({name: value for name, value in said.items() if name not in ("step", "split")}, rel=1e-6)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    expected = [{k: v for k, v in sample.items() if k not in ("step", "set")} for sample in samples if sample["step"] == (step or 4)]
    assert found.records == expected and {"choice:options", "finished"} <= expected[0].keys()


def test_slices_are_the_set_cut_in_parts(folder, whole):
    result = whole.results["held"]
    by = whole.slices["held"]
    assert {column: set(parts) for column, parts in by.items()} == {"source": {"a", "b"}, "facts.long": {"true", "false"}}
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    described = whole.to_dict()["sets"]["held"]
    for parts in described["slices"].values():
        assert sum(part["tokens"] for part in parts.values()) == described["tokens"]
        weighted = sum(part["loss"] * part["tokens"] for part in parts.values()) / described["tokens"]
        assert weighted == pytest.approx(described["loss"])
        answers = sum(part["scores"]["token_f1"]["answers"] for part in parts.values())
        assert answers == described["scores"]["token_f1"]["answers"] == len(result.records)
    lines = {record["example"]["line"] for record in result.select(by["source"]["b"]).records}
    assert lines == {line for line, row in enumerate(rows, 1) if row["source"] == "b"}


def test_bits_per_byte_are_those_of_the_supervised_text(folder, whole):
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    size = sum(len(turn["content"].encode()) for row in rows for turn in row["messages"] if turn["role"] == "assistant")
    values = whole.results["held"].values()
    assert values["bits_per_byte"] == pytest.approx(values["loss"] * values["tokens"] / math.log(2) / size)


def test_choices_are_as_likely_as_their_tokens(folder, run, config, whole):
    """Each choice is trained on by itself in a set of its own, whose losses give its likelihood."""
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    chosen, sizes = [], []
    with open(folder / "choices.jsonl", "w") as file:
        for row in rows:
            for text in row["options"]:
                messages = [*row["messages"][:-1], {"role": "assistant", "content": text}]
                file.write(json.dumps({"messages": messages}) + "\n")
            chosen.append(row["options"].index(row["messages"][-1]["content"]))
            sizes.append(len(row["options"]))
    item = dataclasses.replace(config.data.eval[0], path=(str(folder / "choices.jsonl"),), supervise="last")
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=(item,)), eval=dataclasses.replace(config.eval, generate=0))
    nll = evaluate(run, alone).results["held"].documents.nll
    at = np.cumsum([0, *sizes])
    right = [int(np.argmin(nll[start:stop]) == place) for start, stop, place in zip(at, at[1:], chosen)]
    assert [record["choice:options"] for record in whole.results["held"].records] == right and 0 < sum(right) < len(right)
    texts = [text for row in rows for text in row["options"]]
    per_byte = nll / [len(text.encode()) for text in texts]
    right = [int(np.argmin(per_byte[start:stop]) == place) for start, stop, place in zip(at, at[1:], chosen)]
    assert [record["choice_by_byte:options"] for record in whole.results["held"].records] == right


def test_intervals_hold_their_values(whole):
    described = whole.to_dict()["sets"]["held"]
    low, high = described["loss_interval"]
    assert low < described["loss"] < high
    for score in described["scores"].values():
        assert score["interval"][0] <= score["value"] <= score["interval"][1]
    json.dumps(whole.to_dict(), allow_nan=False)


def test_decoding_is_what_was_asked_for(run, config):
    answers = [
        [record["generation"] for record in evaluate(run, config, decoding=decoding).records()]
        for decoding in (Decoding(5), Decoding(12, stop=("a",)))
    ]
    tokenizer = load_tokenizer(run / "export")
    assert all(len(tokenizer.encode(text)) <= 6 for text in answers[0]) and not any("a" in text for text in answers[1])


@pytest.mark.parametrize(
    ("column", "message"), [("sourc", "no row has the column 'sourc'; did you mean 'source'"), ("facts.short", "no row has")]
)
def test_a_column_that_is_not_there_is_named(run, config, column, message):
    with pytest.raises(UserError, match=message):
        evaluate(run, config, slices=(column,))


@pytest.mark.parametrize(
    ("scorer", "message"), [("choice:number", r"held_out.jsonl:\d+: the column 'number' must hold a list"), ("choice:nothing", "'nothing'")]
)
def test_choices_that_are_none_are_named_by_row(run, config, scorer, message):
    asked = dataclasses.replace(config, eval=dataclasses.replace(config.eval, scorers=(scorer,)))
    with pytest.raises(UserError, match=message):
        evaluate(run, asked)


def test_a_checkpoint_is_named_by_its_folder(run):
    assert run_and_step(run / "checkpoints" / "2") == (str(run), 2)
    assert run_and_step(run) == (str(run), None) and run_and_step("org/2") == ("org/2", None)


def test_a_step_that_is_not_there_is_named_with_those_that_are(run, config):
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 2, 4"):
        evaluate(run, config, step=3)
