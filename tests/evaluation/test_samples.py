import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_data import Plain, make_stream, random_examples
from tiny_models import random_decoder

from sft_jax.evaluation.generate import generate_ids
from sft_jax.evaluation.answers import last_answer
from sft_jax.evaluation.samples import Decoding, HeldOut, generate_answers, sample_held_out, sample_records, score_answers
from sft_jax.evaluation.scorers import find_scorers

STOP = 3


class Numbers:
    """A tokenizer whose text is the ids, the stop id special."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f" {i}" for i in ids if not (skip_special_tokens and i == STOP))


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=12), first=st.sampled_from([0.0, 1.0]))
def test_the_last_supervised_run_is_the_reference(weights, first):
    weights[0] = first  # a first token is never a target, whatever it weighs
    if not any(weights[1:]):
        with pytest.raises(ValueError, match="no supervised token"):
            last_answer(np.arange(len(weights)), np.array(weights))
        return
    text = "".join("x" if weight else "." for weight in [0.0, *weights[1:]])
    stop = text.rindex("x") + 1
    start = text.rindex(".", 0, stop) + 1
    prompt, reference = last_answer(np.arange(len(weights)), np.array(weights))
    assert prompt == list(range(start)) and reference == list(range(start, stop))


@pytest.fixture(scope="module")
def stream():
    return make_stream(random_examples(40), max_length=64)


def test_a_sample_is_a_function_of_the_seed(stream):
    sample = sample_held_out(stream, 10, seed=1)
    assert sample == sample_held_out(stream, 10, seed=1) != sample_held_out(stream, 10, seed=2)
    lines = [item.line for item in sample]
    assert len(set(lines)) == 10 and lines == sorted(lines)
    assert sample_held_out(stream, 5, seed=1) != sample[:5]  # not the beginning of the file
    assert {item.line for item in sample_held_out(stream, 5, seed=1)} < set(lines)  # a larger one holds a smaller one


def test_a_sample_of_more_than_there_are_is_all_of_them(stream):
    examples = random_examples(40)
    sample = sample_held_out(stream, 1000, seed=1)
    assert [item.line for item in sample] == list(range(1, 41))
    for item, example in zip(sample, examples, strict=True):
        assert (item.file, item.turn) == ("rows.jsonl", -1)
        assert item.prompt_ids + item.reference_ids == example.ids  # their last token is supervised


def test_epochs_mixtures_and_order_of_rows_do_not_change_a_sample(stream):
    again = make_stream(random_examples(40), max_length=64, epochs=3.0, seed=9, packing=False)
    assert sample_held_out(again, 10, seed=1) == sample_held_out(stream, 10, seed=1)


def test_only_what_an_overlength_policy_left_is_asked():
    examples = [Plain([1] * 5 + [2] * 20, [0.0] * 5 + [1.0] * 20), Plain([4, 5, 6], [0.0, 1.0, 1.0])]
    (kept,) = sample_held_out(make_stream(examples, max_length=10, overlength="drop"), 5, seed=0)
    assert (kept.line, kept.prompt_ids, kept.reference_ids) == (2, [4], [5, 6])
    cut, _ = sample_held_out(make_stream(examples, max_length=10, overlength="truncate_right"), 5, seed=0)
    assert (cut.line, cut.prompt_ids, cut.reference_ids) == (1, [1] * 5, [2] * 6)


def answered(decoder, held_out, stop_ids, stop=()):
    answers, generations = generate_answers(decoder, Numbers(), held_out, stop_ids, Decoding(8, batch_size=4, stop=stop))
    scored = score_answers(find_scorers(["exact_match"], "eval.scorers"), answers)
    return scored, sample_records(held_out, answers, generations, scored)


def test_generations_are_scored_against_references():
    """References are made from what the model says, so that the score is known."""
    decoder = random_decoder("llama")
    prompts = [[64, 77, 2], [5, 45, 49], [22, 1, 1], [7, 7, 9]]
    answers = [answer.ids for answer in generate_ids(decoder, prompts, (), 8)]
    stop = answers[0][4]  # ends the first answer, and perhaps others, early
    ended = [ids[: ids.index(stop)] if stop in ids else ids for ids in answers]
    references = [[*ended[0], stop, 50, 51], [*ended[1], stop], ended[2], [*ended[3][:-1], (ended[3][-1] + 1) % 96]]
    held_out = [HeldOut("f", n, -1, n, prompts[n], references[n]) for n in range(4)]
    scored, records = answered(decoder, held_out, (stop,))
    assert {name: values.value for name, values in scored.items()} == {"exact_match": 0.75}
    assert [record["exact_match"] for record in records] == [1.0, 1.0, 1.0, 0.0]
    assert [record["finished"] for record in records] == [stop in ids for ids in answers]
    assert records[0]["finished"]
    for number, record in enumerate(records):
        assert record["example"] == {"file": "f", "line": number, "turn": -1}
        assert record["prompt"] == Numbers().decode(prompts[number])
        assert record["generation"] == Numbers().decode(ended[number], skip_special_tokens=True)
    assert records[0]["reference"] == records[0]["generation"]  # cut at its first stop token, as the answer is
    assert list(records[0]) == ["example", "prompt", "reference", "generation", "exact_match", "finished"]


def test_special_tokens_are_no_part_of_the_texts_compared():
    decoder = random_decoder("llama")
    held_out = [HeldOut("f", 1, -1, 0, [4, STOP, 5], [8, STOP, 9])] * 4
    _, (record, *_) = answered(decoder, held_out, ())
    assert record["reference"] == " 8 9" and record["prompt"] == f" 4 {STOP} 5"


def test_a_stop_string_ends_answer_and_reference():
    decoder = random_decoder("llama")
    held_out = [HeldOut("f", 1, -1, 0, [64, 77, 2], [8, 9])] * 4
    _, (whole, *_) = answered(decoder, held_out, ())
    stop = whole["generation"].split()[3]
    held_out = [HeldOut("f", 1, -1, 0, [64, 77, 2], [8, int(stop), 9])] * 4
    _, (record, *_) = answered(decoder, held_out, (), stop=(f" {stop}",))
    assert record["generation"] == whole["generation"][: whole["generation"].index(f" {stop}")]
    assert (record["reference"], record["finished"], whole["finished"]) == (" 8", True, False)
