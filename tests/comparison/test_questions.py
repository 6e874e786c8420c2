"""What is asked, what may be shown, and the conversations that they make."""

import json

import numpy as np
import pytest

from sft_jax.comparison.contenders import Contender, Examples, make_contenders, read_examples
from sft_jax.comparison.prompts import Shelf, composed
from sft_jax.comparison.questions import question_of, read_questions
from sft_jax.comparison.systems import System
from sft_jax.config import ColumnsConfig
from sft_jax.config_parsing import parse_config
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.sources.registry import Where
from sft_jax.errors import UserError


def chat(*texts, **more):
    return {"messages": [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)], **more}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    train = [chat(f"What says fox {number}?", f"It says {number}.") for number in range(60)]
    train += [chat("  what SAYS\nowl 3? ", "A copy of what is asked."), chat("What says fox 7?", "A second answer.")]
    train += [chat("Weather?", "Rain.", tools=[{"type": "function", "function": {"name": "sky", "parameters": {}}}])]
    held_out = [chat(f"What says owl {number}?", f"It says {number}.") for number in range(30)]
    files = {"train": write(folder / "train.jsonl", train), "eval": {"held": write(folder / "held.jsonl", held_out)}}
    return parse_config({"model": {"path": "m"}, "data": {**files, "cache_dir": str(folder)}}).data


def read(data, **changes):
    asked = {"set_name": "", "count": 20, "validation": 10, "pool": 1000, "seed": 0, **changes}
    return read_questions(data, **asked, log=lambda line: None)


def lines(questions):
    return [question.where.line for question in questions]


def test_no_prompt_is_scored_chosen_on_and_shown(data):
    found = read(data, count=None)
    keys = [{question.key for question in part} for part in (found.scored, found.validation, found.pool)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert (len(found.scored), len(found.validation)) == (30, 10) and len(found.pool) == 50  # 60 prompts but those chosen on
    assert 61 not in lines((*found.validation, *found.pool))  # has the prompt of a scored row, but for case and white space
    assert not any(question.brings_tools for question in found.pool)
    assert "1 training rows have the prompt of a scored row" in " ".join(found.notes) and "1 training rows bring tools" in " ".join(found.notes)


def test_rows_are_drawn_by_the_seed(data):
    one, again, other = read(data), read(data), read(data, seed=1)
    assert lines(one.scored) == lines(again.scored) == sorted(lines(one.scored)) and lines(one.pool) == lines(again.pool)
    assert lines(one.pool) != lines(other.pool) and lines(one.scored) != lines(other.scored)
    assert lines(one.pool) != sorted(lines(one.pool))  # examples are drawn, not the first ones
    assert set(lines(read(data, count=5).scored)) < set(lines(one.scored))
    assert read(data, pool=0, validation=0).pool == ()


def test_drawn_examples_are_the_same_for_all_and_near_ones_are_not(data):
    found = read(data)
    shelf = Shelf(found.pool)
    assert lines(shelf.take(found.scored[0], 4, False)) == lines(shelf.take(found.scored[9], 4, False)) == lines(found.pool[:4])
    (fox,) = (question for question in found.pool if question.asked == found.pool[3].asked)
    near = shelf.take(fox, 3, True)
    assert near[-1] is fox and len({question.where for question in near}) == 3  # the most similar last


ROW = chat("Hi", "Hello", "And?", "More", "Then?", "End")


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (ROW, ["Hi", "Hello", "And?", "More", "Then?"], "End"),
        ({"messages": ROW["messages"][:5]}, ["Hi", "Hello", "And?"], "More"),
        ({"messages": [*ROW["messages"][:5], {"role": "assistant", "content": "End", "train": False}]}, ["Hi", "Hello", "And?"], "More"),
    ],
)
def test_the_last_answer_that_is_trained_on_is_asked_for(row, prompt, answer):
    found = question_of(FORMATS["messages"].read(row, ColumnsConfig()), row, Where("f", 1))
    *before, last = found.conversation.messages
    assert ([message.content for message in before], last.content) == (prompt, answer)
    assert all(message.given for message in before) and not last.given


def test_rows_without_an_answer_are_refused():
    for conversation in (
        Conversation(text="all of it"), Conversation(ids=np.arange(4), weights=np.ones(4)), Conversation(messages=(Message("assistant", "Hello"),)),
    ):  # fmt: skip
        with pytest.raises(RowError, match="has no answer"):
            question_of(conversation, {}, Where("f", 1))


def asked(*texts, system=None):
    head = [Message("system", system)] if system else []
    turns = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    return question_of(Conversation(messages=(*head, *turns)), {}, Where("f", 1))


def said(conversation):
    return [(message.role[0], message.content) for message in conversation.messages]


def test_examples_are_earlier_turns_behind_the_system_prompt():
    question, shots = asked("Q", "A", system="own"), [asked("q1", "a1", system="of the example"), asked("q2", "a2", "q3", "a3")]
    turns = [("u", "q1"), ("a", "a1"), ("u", "q2"), ("a", "a2"), ("u", "q3"), ("a", "a3"), ("u", "Q"), ("a", "A")]
    assert said(composed(question, shots, None, True)) == [("s", "own"), *turns]
    found = composed(question, shots, "another", True)
    assert said(found) == [("s", "another"), *turns]
    assert [message.given for message in found.messages[1:]] == [True] * 7 + [False]
    assert said(composed(question, [], "another", True)) == [("s", "another"), ("u", "Q"), ("a", "A")]
    assert composed(question, [], None, True) is question.conversation


def test_without_a_template_examples_are_text_in_front():
    def plain(prompt, completion):
        return question_of(Conversation(prompt=prompt, completion=completion, separator=" "), {}, Where("f", 1))

    question, shots = plain("Q:", "A"), [plain("q1:", "a1\n"), plain("q2:", "a2")]
    found = composed(question, shots, "rules", False)
    assert (found.system, found.prompt, found.completion) == ("rules", "q1: a1\n\nq2: a2\n\nQ:", "A")
    turns = [("u", "q1:"), ("a", "a1\n"), ("u", "q2:"), ("a", "a2"), ("u", "Q:"), ("a", "A")]
    assert said(composed(question, shots, "rules", True)) == [("s", "rules"), *turns]


def test_contenders_are_all_ways_of_the_first_model_and_the_others_as_they_are():
    examples = read_examples(["4", "auto"], ["4"])
    found = make_contenders(["base", "tuned"], examples, [System("terse", "Be brief.")])
    assert [contender.name for contender in found] == [
        "base", "base, 4 examples", "base, auto examples", "base, 4 nearest examples", "base, system terse", "base, system terse, 4 examples",
        "base, system terse, auto examples", "base, system terse, 4 nearest examples", "tuned",
    ]  # fmt: skip
    assert len(make_contenders(["base", "tuned"], examples, prompt_each=True)) == 8
    assert Contender("base", examples=Examples("auto", True)).with_examples(1).name == "base, 1 nearest example"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: read(data, set_name="hold"), "--set: there is no held-out set 'hold'; did you mean 'held'"),
        (lambda data: read_examples(["0"], []), "--shots: must be a number of examples above 0, or auto, not '0'"),
        (lambda data: read_examples(["2", "2"], []), "--shots: '2' is named twice"),
        (lambda data: read_examples([], ["many"]), "--retrieve: must be a number"),
        (lambda data: make_contenders(["a"]), "nothing to compare"),
        (lambda data: make_contenders(["a", "a"]), "--model: a is named twice"),
    ],
)
def test_what_cannot_be_compared_is_named(data, change, message):
    with pytest.raises(UserError, match=message):
        change(data)


def test_rows_that_cannot_be_used_stop_the_comparison_or_are_counted(tmp_path):
    rows = [chat("Q1", "A1"), {"messages": [{"role": "user", "content": "alone"}]}, chat("Q2", "A2")]
    files = {"train": write(tmp_path / "train.jsonl", rows[:1]), "eval": write(tmp_path / "held.jsonl", rows)}

    def data(**more):
        return parse_config({"model": {"path": "m"}, "data": {**files, "cache_dir": str(tmp_path), **more}}).data

    with pytest.raises(UserError, match=r"held.jsonl:2: the conversation has no assistant turn"):
        read(data(), pool=0, validation=0)
    found = read(data(bad_rows="skip"), pool=0, validation=0)
    assert lines(found.scored) == [1, 3] and "1 held-out rows cannot be used" in found.notes[0]
    with pytest.raises(UserError, match="data.train: has no row that could be shown"):
        read(data(bad_rows="skip"))
    with pytest.raises(UserError, match="data.train: is empty, and examples are taken from there"):
        read(parse_config({"model": {"path": "m"}, "data": {"eval": files["eval"], "bad_rows": "skip"}}, needs_data=False).data)
    with pytest.raises(UserError, match="data.eval: is empty"):
        read(parse_config({"model": {"path": "m"}, "data": {"train": files["train"]}}).data)
    two = {"a": files["eval"], "b": files["eval"]}
    with pytest.raises(UserError, match="--set: is missing, and data.eval has several sets; name one of a, b"):
        read(data(eval=two))
