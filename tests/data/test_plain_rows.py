"""Prompts, completions and texts without a template: what is supervised, and ids that are those of inference."""

import pytest
from built_rows import build, chat, supervised, texts_of
from hypothesis import given, settings
from tokenizer_texts import unicode_texts

from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation


def test_completion(llama):
    (row,) = build(llama, None, Conversation(prompt="Question: 1+1=", completion=" 2"))
    example = row.examples[0]
    assert row.kind == "plain"
    assert example.ids.tolist() == [1, *llama.encode("Question: 1+1= 2"), 2]
    assert example.weights.tolist() == [0] * (len(example.ids) - 3) + [1] * 3  # space, 2, EOS
    assert example.turn_starts.tolist() == [1, len(example.ids) - 3] and example.turn_roles == ("user", "assistant")


def test_completion_with_system_and_separator(qwen):
    (row,) = build(qwen, None, Conversation(prompt="p", completion="c", system="s", separator="\n\n"))
    assert qwen.decode(row.examples[0].ids) == "s\n\np\n\nc<|im_end|>"
    assert texts_of(qwen, row) == [(-1, ["c<|im_end|>"])]


@pytest.mark.parametrize(
    ("supervise", "share"), [("user", "prompt"), ("all", "everything"), ("user,assistant", "everything")]
)
def test_completion_supervise(llama, supervise, share):
    (row,) = build(llama, None, Conversation(prompt="one two", completion=" three"), supervise=supervise)
    text = "".join(supervised(llama, row.examples[0])).replace("</s>", "|")
    assert text.split() == {"prompt": ["one", "two"], "everything": ["one", "two", "three|"]}[share]


def test_text_is_supervised_but_for_bos(llama, qwen):
    for tokenizer in (llama, qwen):
        (row,) = build(tokenizer, "chatml", Conversation(text="Once upon a time"))
        example = row.examples[0]
        assert example.ids.tolist() == [
            *tokenizer.plain_prefix,
            *tokenizer.encode("Once upon a time"),
            tokenizer.eos_id,
        ]
        assert example.weights.tolist() == [0, *[1] * (len(example.ids) - 1)]


def test_eos_is_trained_where_it_is_the_padding_token_too(llama):
    assert llama.pad_id == llama.eos_id
    rows = build(llama, None, Conversation(prompt="a", completion=" b"), Conversation(text="c"), chat("a", "b"))
    for row in rows[:2]:
        assert row.examples[0].ids[-1] == llama.eos_id and row.examples[0].weights[-1] == 1
    (row,) = build(llama, "zephyr", chat("a", "b"))
    assert row.examples[0].weights[row.examples[0].ids == llama.eos_id].tolist() == [0, 1]


def test_token_zero_keeps_its_weight(qwen):
    assert qwen.encode("!") == [0]
    (row,) = build(qwen, "chatml", chat("!", "!"))
    assert row.examples[0].weights[row.examples[0].ids == 0].tolist() == [0, 1]


def test_eos_that_the_data_writes_is_not_doubled(llama):
    (row,) = build(llama, None, Conversation(prompt="a", completion=" b</s>"), allow_special_tokens=True)
    assert (row.examples[0].ids == llama.eos_id).sum() == 1 and row.examples[0].weights[-1] == 1


def test_bos_is_there_once(tiny, llama):
    for tokenizer in (llama, tiny):
        for name in ("chatml", "llama2", "llama3", "gemma", "zephyr", "alpaca", "vicuna", None):
            conversations = (
                [chat("a", "b")] if name else [Conversation(prompt="a", completion=" b"), Conversation(text="c")]
            )
            for row in build(tokenizer, name, *conversations):
                ids = row.examples[0].ids
                assert (ids == tokenizer.bos_id).sum() == 1 and ids[0] == tokenizer.bos_id, name


# --- seams ---


def test_the_prompt_s_ids_win(qwen):
    """`assistant\\n` and an answer that begins with a line feed would share a token."""
    (row,) = build(qwen, "chatml", chat("a", "\nb", "c", "d"))
    assert (row.kind, row.counts) == ("cut", {"seam_cuts": 1})
    whole, own = row.examples
    assert (whole.turn, own.turn) == (-1, 0)
    prompt = qwen.encode("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert own.ids[: len(prompt)].tolist() == prompt
    assert supervised(qwen, own) == ["\nb<|im_end|>"]
    # The later turn must see the ids that a server makes of the history, so the first is not cut there.
    assert supervised(qwen, whole) == ["d<|im_end|>"]
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    assert whole.ids.tolist() == qwen.encode(text + "<|im_start|>assistant\nd<|im_end|>\n")


def test_a_seam_in_the_last_turn_is_cut_in_place(qwen):
    (row,) = build(qwen, "chatml", chat("a", "b", "c", "\n\nd"))
    assert (row.kind, row.counts) == ("cut", {"seam_cuts": 1})
    assert texts_of(qwen, row) == [(-1, ["b<|im_end|>", "\n\nd<|im_end|>"])]


@pytest.mark.parametrize("prompt", ["Answer: ", "x =", "line\n", "dash-", "12", "word", "é", "a  ", "tab\t", ""])
@pytest.mark.parametrize("completion", ["yes", " yes", "\nyes", "= 5", "345", "\u0301", "  two", "ing", ""])
def test_prompt_ids_are_those_of_inference(qwen, llama, prompt, completion):
    for tokenizer in (qwen, llama):
        (row,) = build(tokenizer, None, Conversation(prompt=prompt, completion=completion))
        check_plain(tokenizer, row, prompt, completion)


def check_plain(tokenizer, row, prompt, completion):
    if isinstance(row, BadRow):  # nothing is left to learn: not even EOS follows anything
        assert prompt == completion == "" and not tokenizer.plain_prefix
        return
    example = row.examples[0]
    before = [*tokenizer.plain_prefix, *tokenizer.encode(prompt)]
    assert example.ids[: len(before)].tolist() == before
    first = max(len(before), 1)
    assert not example.weights[:first].any() and example.weights[first:].all()
    assert example.ids[-1] == tokenizer.eos_id


@settings(max_examples=150, deadline=None)
@given(prompt=unicode_texts, completion=unicode_texts)
def test_prompt_ids_are_those_of_inference_for_any_text(tiny, prompt, completion):
    (row,) = build(tiny, None, Conversation(prompt=prompt, completion=completion), allow_special_tokens=True)
    if completion.endswith("</s>"):
        return
    check_plain(tiny, row, prompt, completion)
