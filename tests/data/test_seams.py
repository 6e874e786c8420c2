"""Seams: the short look at the end of a prompt agrees with encoding the whole prompt again."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_cases import shared_tokenizer
from sft_jax.data.seams import SeamEncoder
from tokenizer_texts import unicode_texts

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
