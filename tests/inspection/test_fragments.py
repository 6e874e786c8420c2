"""Tokens as text: pieces of one weight put together are what the ids decode to; nothing acts on a terminal."""

import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.inspection.fragments import fragments, supervised_text
from sft_jax.printable import printable, split_unsafe

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer of bytes: characters beyond ASCII are several tokens."""
    folder = tmp_path_factory.mktemp("bytes")
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(["what says the fox"] * 3, vocab_size=300, show_progress=False)
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}')
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pieces(model):
    return load_tokenizer(model)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), data=st.data(), each_token=st.booleans())
def test_fragments_put_together_are_the_text(byte_level, texts, data, each_token):
    text = "<|end|>".join(texts)
    ids = np.array(byte_level.encode(text), np.int32)
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(ids), max_size=len(ids))), np.float32)
    found = fragments(byte_level, ids, weights, each_token=each_token)
    assert "".join(fragment.text for fragment in found) == text
    assert [at for fragment in found for at in range(fragment.start, fragment.stop)] == list(range(len(ids)))
    end = byte_level.added_tokens["<|end|>"]
    for fragment in found:
        assert (weights[fragment.start : fragment.stop] == fragment.weight).all()
        assert ((ids[fragment.start : fragment.stop] == end) == fragment.control).all()
        assert not each_token or fragment.stop == fragment.start + 1


@settings(max_examples=100, deadline=None)
@given(before=TEXTS, answer=TEXTS)
def test_supervised_text_is_that_of_the_tokens_behind_a_seam(byte_level, before, answer):
    first, second = byte_level.encode(before), byte_level.encode(answer)
    ids = np.array([*first, *second, byte_level.eos_id], np.int32)
    weights = np.array([0] * len(first) + [1] * (len(second) + 1), np.float32)
    assert supervised_text(byte_level, ids, weights) == answer + "<|end|>"


def test_a_space_between_words_is_kept_and_one_that_the_tokenizer_adds_is_not(pieces):
    ids = np.array([pieces.bos_id, *pieces.encode("What says the fox?"), pieces.eos_id], np.int32)
    weights = np.array([0] * 3 + [1] * (len(ids) - 3), np.float32)
    found = [fragment.text for fragment in fragments(pieces, ids, weights)]
    assert "".join(found) == "<s>What says the fox?</s>"
    assert supervised_text(pieces, ids, weights).endswith(" the fox?</s>")


def test_a_part_of_a_character_is_shown_with_the_rest_of_it(byte_level):
    ids = np.array(byte_level.encode("aé"), np.int32)
    assert [f.text for f in fragments(byte_level, ids, np.zeros(3, np.float32), each_token=True)] == ["a", "", "é"]
    alone = fragments(byte_level, ids[:2], np.zeros(2, np.float32), each_token=True)
    assert [f.text for f in alone] == ["a", "\ufffd"]


def test_a_replacement_character_of_the_text_stays_where_it_is(byte_level):
    first, second = (byte_level.encode(text) for text in ("a\ufffd", "bc"))
    weights = np.array([0] * len(first) + [1] * len(second), np.float32)
    found = fragments(byte_level, np.array(first + second, np.int32), weights)
    assert [(fragment.text, fragment.weight) for fragment in found] == [("a\ufffd", 0), ("bc", 1)]


def test_no_tokens_have_no_fragments(byte_level):
    assert fragments(byte_level, np.zeros(0, np.int32), np.zeros(0, np.float32)) == []


@settings(max_examples=300)
@given(st.text())
def test_what_is_printable_moves_no_cursor_and_hides_nothing(text):
    shown = printable(text)
    for character in shown:
        assert character in "\t\n" or unicodedata.category(character) not in ("Cc", "Cs")
        assert unicodedata.bidirectional(character) not in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    pieces = list(split_unsafe(text))
    kept = "".join(piece for piece, unsafe in pieces if not unsafe)
    undone = "".join(piece.encode("ascii").decode("unicode_escape") if unsafe else piece for piece, unsafe in pieces)
    assert undone == text and set(kept) <= set(text)


def test_escapes_are_short_and_readable():
    assert printable("a\x1b[1m\r\x9b\u202e\U000e0041\ud800") == r"a\x1b[1m\x0d\x9b\u202e\U000e0041\ud800"
    assert printable("line\n\ttab é 漢 👩‍🔬") == "line\n\ttab é 漢 👩‍🔬"
