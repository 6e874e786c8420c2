import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.evaluation.text import TextStream, TextUntilStop, continuation_text, cut_before


class Backend:
    """A tokenizer.json through the tokenizers library alone."""

    def __init__(self, path):
        self._backend = Tokenizer.from_file(str(path))

    def encode(self, text):
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=False):
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


FOLDERS = ["models/stories260k", "tokenizers/llama2", "tokenizers/qwen3", "tokenizers/mistral_v3"]


@pytest.fixture(scope="module", params=FOLDERS)
def tokenizer(request, assets):
    folder = assets / request.param
    return Backend(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else load_tokenizer(folder)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40),
    cut=st.integers(0, 60),
)
def test_prompt_and_pieces_make_up_the_decoded_whole(tokenizer, text, cut):
    ids = tokenizer.encode("Once: " + text)
    cut = min(cut, len(ids))
    while tokenizer.decode(ids[:cut]).endswith("\ufffd"):  # a prompt is whole text
        cut -= 1
    whole = tokenizer.decode(ids)
    assert tokenizer.decode(ids[:cut]) + continuation_text(tokenizer, ids[:cut], ids[cut:]) == whole
    stream = TextStream(tokenizer, ids[:cut])
    pieces = [stream.push([i]) for i in ids[cut:]]
    assert not any("\ufffd" in piece for piece in pieces), "a piece holds half a character"
    assert tokenizer.decode(ids[:cut]) + "".join(pieces) + stream.finish() == whole


def test_a_space_between_prompt_and_answer_stays(tokenizer):
    prompt, answer = tokenizer.encode("Lily had a"), tokenizer.encode("Lily had a ball")
    assert answer[: len(prompt)] == prompt
    assert continuation_text(tokenizer, prompt, answer[len(prompt) :]) == " ball"


def test_a_character_of_many_tokens_comes_whole_and_an_unfinished_one_at_the_end(tokenizer):
    start = tokenizer.encode("a b")
    ids = tokenizer.encode("a b𒀀")
    assert ids[: len(start)] == start and len(ids) >= len(start) + 2
    stream = TextStream(tokenizer, start)
    assert [stream.push([i]) for i in ids[len(start) :]][-1] == "𒀀"
    assert stream.finish() == ""
    stream = TextStream(tokenizer, start)
    assert "".join(stream.push([i]) for i in ids[len(start) : -1]) == ""
    assert "\ufffd" in stream.finish()


def test_special_tokens_are_left_out_unless_asked_for(assets):
    tokenizer = Backend(assets / "tokenizers/qwen3" / "tokenizer.json")
    ids = tokenizer.encode("hello<|im_end|>")
    assert continuation_text(tokenizer, [], ids) == "hello"
    assert continuation_text(tokenizer, [], ids, skip_special_tokens=False) == "hello<|im_end|>"


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("ab.\n", max_size=4), max_size=8), strings=st.lists(st.text("ab.\n", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string_that_is_complete(pieces, strings):
    """Whatever the pieces, what is given is a beginning of what is given in the end, which the whole text so far says."""
    until, given_text = TextUntilStop(strings), ""
    for number, piece in enumerate(pieces):
        given_text += until.push(piece)
        so_far = "".join(pieces[: number + 1])
        assert until.stopped == any(string in so_far for string in strings)
        if until.stopped:
            assert given_text == cut_before(so_far, strings)
            break
        held = so_far.removeprefix(given_text)
        assert so_far.startswith(given_text) and (not held or any(string.startswith(held) for string in strings))
    given_text += until.finish()
    assert until.stopped or given_text == "".join(pieces)
