"""Hugging Face tokenizers against transformers and llama.cpp's vectors."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_texts import check_ranges, unicode_texts, vectors
from transformers import AutoTokenizer

from sft_jax.data.tokenizers import hf_tokenizer
from sft_jax.data.tokenizers.tokens import Tokenizer, load_tokenizer
from sft_jax.errors import UserError

FOLDERS = ("tokenizers/llama2", "tokenizers/llama3", "tokenizers/qwen3", "models/stories260k")


@pytest.fixture(scope="module")
def loaded(assets):
    """Folder -> (our tokenizer, transformers'), each loaded once."""
    cache = {}

    def load(folder):
        if folder not in cache:
            cache[folder] = load_tokenizer(assets / folder), AutoTokenizer.from_pretrained(str(assets / folder))
        return cache[folder]

    return load


@pytest.mark.parametrize("folder", FOLDERS)
def test_ids_and_decoding_are_those_of_transformers_on_the_vectors(assets, loaded, folder):
    ours, theirs = loaded(folder)
    inputs, _ = vectors(assets, "llama2")
    encodings = ours.encode_with_offsets(inputs)
    for text, encoding in zip(inputs, encodings, strict=True):
        wanted = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == wanted == encoding.ids.tolist()
        check_ranges(text, encoding)
        ids = [*ours.plain_prefix, *wanted]
        assert theirs(text)["input_ids"] == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_ids_are_those_of_llama_cpp(assets, loaded, name):
    ours, _ = loaded(f"tokenizers/{name}")
    inputs, outputs = vectors(assets, name)
    for text, wanted in zip(inputs, outputs, strict=True):
        assert ours.encode(text) == wanted, text


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "tokenizers/qwen3", "models/stories260k"])
def test_ids_are_those_of_transformers_on_any_text(loaded, folder):
    ours, theirs = loaded(folder)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(unicode_texts, max_size=4))
    @example(["", " ", "a</s> b</s>c<|im_end|>", "<s>"])
    def check(batch):
        encodings = ours.encode_with_offsets(batch)
        assert len(encodings) == len(batch)
        for text, encoding in zip(batch, encodings, strict=True):
            wanted = theirs(text, add_special_tokens=False)["input_ids"]
            assert encoding.ids.tolist() == wanted == ours.encode(text)
            check_ranges(text, encoding)

    check()


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "tokenizers/qwen3", "models/stories260k"])
def test_ranges_from_bytes_equal_the_ranges_of_the_library(loaded, folder, monkeypatch):
    ours, _ = loaded(folder)

    @settings(max_examples=100, deadline=None)
    @given(unicode_texts)
    def check(text):
        fast = ours.encode_with_offsets([text])[0]
        with monkeypatch.context() as patch:
            patch.setattr(hf_tokenizer, "align", lambda table, batch, ids: [None] * len(batch))
            slow = ours.encode_with_offsets([text])[0]
        assert all((a == b).all() for a, b in zip(fast, slow, strict=True))

    check()


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "tokenizers/qwen3"])
def test_the_slice_of_a_token_is_its_text(loaded, folder):
    ours, _ = loaded(folder)
    text = "Hello  world, it's 12345! naïve ½ 漢字 🤗\n\tend <|im_end|></s> x"
    encoding = ours.encode_with_offsets([text])[0]
    backend = ours._tokenizer
    whole = 0
    for token, start, end in zip(*(part.tolist() for part in encoding), strict=True):
        piece = backend.id_to_token(token).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")
        if piece.isascii() and not piece.startswith("<0x"):
            assert text[start:end] == (piece[1:] if start == 0 and piece[0] == " " else piece)
            whole += 1
    assert whole > 15


def test_text_that_a_normaliser_changes_still_has_its_ranges(loaded):
    ours, theirs = loaded("tokenizers/qwen3")
    text = "cafe\u0301 A\u030a end"
    encoding = ours.encode_with_offsets([text])[0]
    assert encoding.ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    check_ranges(text, encoding)
    assert text[encoding.starts[-1] : encoding.ends[-1]] == " end"


def test_a_batch_of_changed_texts_switches_to_the_library_with_the_same_result(assets):
    ours = load_tokenizer(assets / "models/stories260k")  # puts a space after every control token
    batch = [f"a</s>b{i}</s>c" for i in range(64)]
    first, second = ours.encode_with_offsets(batch), ours.encode_with_offsets(batch)
    for one, two in zip(first, second, strict=True):
        assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_an_empty_batch_and_an_empty_text(loaded):
    ours, _ = loaded("tokenizers/llama2")
    assert ours.encode_with_offsets([]) == []
    assert [len(item.ids) for item in ours.encode_with_offsets(["", ""])] == [0, 0]


def test_half_of_a_surrogate_pair_is_refused(loaded):
    ours, _ = loaded("tokenizers/llama2")
    with pytest.raises(UserError, match="surrogate"):
        ours.encode_with_offsets(["fine", "a\ud800"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_a_tokenizer_says_of_itself(loaded, folder):
    ours, theirs = loaded(folder)
    assert isinstance(ours, Tokenizer)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1 == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.added_tokens == theirs.get_added_vocab()
    special = {token.content for token in theirs.added_tokens_decoder.values() if token.special}
    assert ours.special_added_tokens == special


def test_only_some_added_tokens_of_qwen3_are_special(loaded):
    ours, _ = loaded("tokenizers/qwen3")
    assert "<think>" in ours.added_tokens and "<think>" not in ours.special_added_tokens
    assert "<|im_end|>" in ours.special_added_tokens
    assert ours.vocab_size == 151669
