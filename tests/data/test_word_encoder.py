"""A text read word by word has the ids that the tokenizer library has for the whole, whatever the text is."""

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.tokenizers import word_encoder
from sft_jax.data.tokenizers.alignment import TokenBytes
from sft_jax.data.tokenizers.hf_tokenizer import token_bytes
from sft_jax.data.tokenizers.word_encoder import WORD_PATTERNS, WordEncoder, word_encoder_of

CORPUS = ["How many apples are left? She has 12.5 + 3 = 15.5 apples", "I'll say: don't!  Two  spaces", "naïve café 漢字 emoji 🙂🙂", "x = [1, 2]\n    y\t= 'a b'\n"]
ADDED = ["<|end|>", "<s>", "<|end|>x", "[TOOL]"]


def library(kind: str) -> tokenizers.Tokenizer:
    """A small BPE of its own training, as Llama 2's (Metaspace, bytes as fallback) or over the words of a pattern."""
    models, pre, trainers = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.trainers
    if kind in ("metaspace", "metaspace_always"):
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="always")
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[f"<0x{byte:02X}>" for byte in range(256)], show_progress=False)
        tokenizer.train_from_iterator(CORPUS * 9, trainer)
        # As published: learnt from words, read without a division into words.
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first" if kind == "metaspace" else "always", split=False)
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        split = pre.Split(tokenizers.Regex(sorted(WORD_PATTERNS)[int(kind)]), "isolated")
        tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
        tokenizer.train_from_iterator(CORPUS * 9, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ADDED])
    return tokenizer


KINDS = ("metaspace", "metaspace_always", *map(str, range(len(WORD_PATTERNS))))


@pytest.fixture(scope="module")
def encoders():
    """Of each kind: the library's ids of texts, and the encoder."""
    made = {}
    for kind in KINDS:
        own = library(kind)
        run = lambda texts, own=own: [item.ids for item in own.encode_batch(texts, add_special_tokens=False)]
        made[kind] = run, word_encoder_of(own.to_str(), run, token_bytes(own))
    return made


def assert_equal(run, encoder, texts: list[str]) -> None:
    for text, ids, wanted in zip(texts, encoder.encode_batch(texts), run(texts), strict=True):
        assert ids.dtype == np.int32 and ids.tolist() == wanted, text


PIECES = st.sampled_from([*" \n\t\r\xa0\u2003\u3000\x1c\u0301\u2581.,'5aZé漢🙂", "  ", "\n\n", "don't", " I'LL", "apples", "<s>", "<|end|>", "x", "[TOOL]", "\u1e9b\u0323"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.one_of(st.lists(PIECES, max_size=30).map("".join), st.text(max_size=40)), min_size=1, max_size=4))
def test_ids_are_those_of_the_library(encoders, kind, texts):
    assert_equal(*encoders[kind], [text.encode("utf-8", "ignore").decode() for text in texts])


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_memory_changes_nothing(encoders, kind, monkeypatch):
    """It is emptied in the middle of texts whose words come again; a long word is not kept."""
    run, encoder = encoders[kind]
    monkeypatch.setattr(word_encoder, "_REMEMBERED", 20)
    choose = random.Random(3)
    words = " ".join(CORPUS).split(" ") + ["w" * 60]
    for _ in range(30):
        assert_equal(run, encoder, [" ".join(choose.choices(words, k=12)) for _ in range(3)])
        assert len(encoder._inner.known) <= 40 and not any(len(word) > 48 for word in encoder._inner.known)


def test_words_are_encoded_once():
    """The library is asked for what is new alone."""
    own, asked = library("0"), []

    def run(texts):
        asked.extend(texts)
        return [item.ids for item in own.encode_batch(texts, add_special_tokens=False)]

    encoder = WordEncoder({}, run, token_bytes(own))
    encoder.encode_batch(["apples are apples are apples", "apples are"])
    assert asked[1] == "apples" and len(asked) == 3 and sorted(asked[2].split(" ")) == ["apples", "are", "x"]
    encoder.encode_batch(["apples apples are"])
    assert asked[3:] == ["x"]


IDS = lambda texts: [[0] * len(text) for text in texts]


def changed(kind: str, change) -> str:
    state = json.loads(library(kind).to_str())
    change(state)
    return json.dumps(state)


@pytest.mark.parametrize(
    "kind, change",
    [
        ("metaspace", lambda state: state["model"]["vocab"].update({"a▁b": 999})),
        ("metaspace", lambda state: state["model"].update(dropout=0.1)),
        ("metaspace", lambda state: state["added_tokens"][0].update(rstrip=True)),
        ("metaspace", lambda state: state["added_tokens"][0].update(normalized=True)),
        ("metaspace", lambda state: state["added_tokens"][0].update(content="x y")),
        ("metaspace", lambda state: state.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": True})),
        ("metaspace", lambda state: state.update(pre_tokenizer=None)),
        ("0", lambda state: state["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\S+ \S+|.")),
        ("0", lambda state: state["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
        ("0", lambda state: state.update(normalizer={"type": "Lowercase"})),
    ],
)  # fmt: skip
def test_a_tokenizer_whose_rules_do_not_show_it_has_no_encoder(kind, change):
    assert word_encoder_of(library(kind).to_str(), IDS, TokenBytes([])) is not None
    assert word_encoder_of(changed(kind, change), IDS, TokenBytes([])) is None
