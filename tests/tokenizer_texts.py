"""Texts that tokenizers get wrong, and what must hold of the ranges of tokens."""

import numpy as np
from hypothesis import strategies as st

CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<think>", "<|begin_of_text|>", "<tool_call>")

# Texts that meet every path: bytes of a character, combining marks, control tokens, spaces at the edges.
texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [*CONTROL, " ", "  ", "\n", "\n\n", "▁", "é", "e\u0301", "🤗", "👩‍👩‍👧", "½", "ﬁ", "\u00a0", "\r\n", "\x00"]
        ),
        st.sampled_from(["Hello", " world", "1234", "def f(x):", "漢字", "'s", "...", "A\u030a"]),
    ),
    max_size=10,
).map("".join)
unicode_texts = texts.filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))


def vectors(assets, name):
    """Returns llama.cpp's test strings and the ids of each."""
    folder = assets / "reference" / "tokenizer_vectors"
    inputs = (folder / f"{name}.inp").open(encoding="utf-8", newline="").read().split("\n__ggml_vocab_test__\n")
    outputs = (folder / f"{name}.out").read_text().splitlines()
    inputs, outputs = inputs[: len(outputs)], [[int(part) for part in line.split()] for line in outputs]
    assert len(inputs) == len(outputs) == 46
    return inputs, outputs


def check_ranges(text, encoding):
    """Ranges cover the text without gaps and do not decrease."""
    starts, ends = encoding.starts.tolist(), encoding.ends.tolist()
    assert encoding.ids.dtype == encoding.starts.dtype == encoding.ends.dtype == np.int32
    assert len(encoding.ids) == len(starts) == len(ends)
    if not starts:
        return
    assert starts == sorted(starts) and ends == sorted(ends)
    assert starts[0] == 0 and ends[-1] == len(text)
    assert all(start < end for start, end in zip(starts, ends, strict=True))
    assert all(start <= before for start, before in zip(starts[1:], ends[:-1], strict=True))
