"""Seams: the short look at the end of a prompt agrees with encoding the whole prompt again."""

import json
import random

import numpy as np
import pytest
from chat_cases import shared_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import unicode_texts

from sft_jax.data.chats.seams import SeamEncoder
from sft_jax.data.tokenizers.alignment import Encoding

FOLDERS = {
    "qwen3": "tokenizers/qwen3",
    "llama3": "tokenizers/llama3",
    "llama2": "tokenizers/llama2",
    "mistral": "tokenizers/mistral_v3",
    "tiny": "models/stories260k",
}


@pytest.fixture(params=FOLDERS)
def tokenizer(request, assets):
    return shared_tokenizer(assets / FOLDERS[request.param])


@pytest.fixture(scope="module")
def tiny(assets):
    return shared_tokenizer(assets / FOLDERS["tiny"])


def broken_by_definition(tokenizer, text, place):
    """Returns whether the ids of the text do not begin with those of `text[:place]`."""
    before = tokenizer.encode(text[:place])
    return tokenizer.encode(text)[: len(before)] != before


def passages(assets, count):
    rows = (assets / "datasets" / "gsm8k" / "train.jsonl").read_text().splitlines()[:count]
    texts = [" ".join(json.loads(row).values()) for row in rows]
    odd = [
        "x  \n\n  y\t\tz",
        "a" * 300 + " b",
        "漢字かな交じり文です。" * 30,
        "1234567 89-10 " * 20,
        "don't 'll  ''s we're",
    ]
    marks = ["<|im_start|>user\nHi  there<|im_end|>\n<|im_start|>assistant\n\n\n  ok", "<s>[INST] a [/INST]  b </s>"]
    return [*texts, *odd, *marks]


def test_agrees_with_the_definition(tokenizer, assets):
    """At every kind of place in real text, in text without spaces, in runs of white space."""
    draw = random.Random(0)
    encoder = SeamEncoder(tokenizer)
    texts = passages(assets, 40)
    places = [sorted(draw.sample(range(1, len(text)), min(40, len(text) - 1))) for text in texts]
    found = encoder.broken(texts, encoder.encode(texts), places)
    total = 0
    for text, own, broken in zip(texts, places, found, strict=True):
        wrong = {place for place in own if broken_by_definition(tokenizer, text, place)}
        assert broken == wrong, (text[:80], sorted(broken ^ wrong))
        total += len(wrong)
    assert total > 100


@settings(max_examples=200, deadline=None)
@given(text=unicode_texts, place=st.integers(0, 40))
def test_agrees_with_the_definition_anywhere(tiny, text, place):
    place = min(place, len(text))
    encoder = SeamEncoder(tiny)
    (found,) = encoder.broken([text], encoder.encode([text]), [[place]])
    assert found == ({place} if broken_by_definition(tiny, text, place) else set())


def test_cut_texts_read_as_before(tokenizer, assets):
    """The prompt's ids come first; the rest follows it without a space that is not in the text."""
    draw = random.Random(1)
    encoder = SeamEncoder(tokenizer)
    # Without control tokens: behind one, some models write a space of their own, and nothing is ever cut there.
    texts = [text for text in passages(assets, 20) if "<" not in text for _ in range(6)]
    cuts = [draw.randrange(1, len(text)) for text in texts]
    for text, cut, encoding in zip(texts, cuts, encoder.encode_cut(texts, cuts), strict=True):
        before = tokenizer.encode(text[:cut])
        assert encoding.ids[: len(before)].tolist() == before
        plain = tokenizer.decode(tokenizer.encode(text))
        assert tokenizer.decode(encoding.ids) == plain, (text[max(0, cut - 20) : cut], text[cut : cut + 20])
        assert (np.diff(encoding.starts) >= 0).all() and encoding.starts[len(before)] >= cut
        assert encoding.ends[-1] == len(text)


def test_texts_that_begin_alike_are_encoded_as_if_alone(tokenizer, assets):
    """As the turns of a long chat do; with markup that the tokenizer knows, that it does not, and none at all."""
    draw = random.Random(2)
    marks = [text for text in tokenizer.added_tokens if text.strip()] + ["<|im_end|>\n<|im_start|>user\n", "</s>", " ", "\n"]
    parts = passages(assets, 20)
    texts, text = [], " ".join(parts[:12])
    for _ in range(40):
        text += draw.choice(marks) + draw.choice(["", " ", "\n\n", "  x"]) + draw.choice(parts)[: draw.randrange(1, 300)]
        texts += [text[: len(text) - draw.randrange(20)], text]
        text = text[: len(text) - draw.choice([0, 0, draw.randrange(400)])]
    for mine, alone in zip(SeamEncoder(tokenizer).encode(texts), texts, strict=True):
        (wanted,) = tokenizer.encode_with_offsets([alone])
        assert all(map(np.array_equal, mine, wanted)), alone[-300:]


def test_what_begins_alike_is_encoded_once():
    """So a chat whose turns are examples of their own takes characters as it has, not as all its examples have."""
    encoded = []

    class Counting:
        vocab_size, added_tokens = 256, {"|": ord("|")}

        def encode(self, text):
            return [*text.encode()]

        def encode_with_offsets(self, texts):
            encoded.append(sum(map(len, texts)))
            places = [np.arange(len(text), dtype=np.int32) for text in texts]
            ids = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
            return [Encoding(*parts) for parts in zip(ids, places, [place + 1 for place in places], strict=True)]

    turns = [f"|{number}{'x' * 1000}" for number in range(100)]
    texts = ["".join(turns[: count + 1]) for count in range(100)]
    found = SeamEncoder(Counting()).encode(texts)
    assert [bytes(each.ids.tolist()).decode() for each in found] == texts
    assert sum(encoded) < 5 * len(texts[-1]) < sum(map(len, texts)) / 10
