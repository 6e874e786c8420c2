"""Rows of each format, and any rows at all."""

import numpy as np
from hypothesis import strategies as st

from sft_jax.config import ColumnsConfig
from sft_jax.data.formats.conversation import Conversation, Message, Piece
from sft_jax.data.formats.registry import FORMATS

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TURNS = (Message("user", "Hi"), Message("assistant", "Hello"))
STANDARD = ColumnsConfig()
# One row of each format, and what it says.
ROWS = {
    "messages": ({"messages": [USER, ANSWER]}, Conversation(messages=TURNS)),
    "prompt_completion": ({"prompt": "Hi ", "completion": "Hello"}, Conversation(prompt="Hi ", completion="Hello")),
    "alpaca": (
        {"instruction": "Hi", "input": "", "output": "Hello"},
        Conversation(prompt="Hi", completion="Hello", separator="\n\n"),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        Conversation(messages=TURNS),
    ),
    "text": ({"text": "Once upon a time"}, Conversation(text="Once upon a time")),
    "segments": (
        {"segments": [{"text": "2+2=", "label": False}, {"text": "4", "weight": 0.5}]},
        Conversation(text="2+2=4", pieces=(Piece(0, 4, 0.0), Piece(4, 5, 0.5))),
    ),
    "tokens": (
        {"input_ids": [5, 6, 7], "weights": [0, 0.5, 1]},
        Conversation(ids=np.array([5, 6, 7]), weights=np.array([0, 0.5, 1])),
    ),
}


def read(name, row, columns=STANDARD):
    return FORMATS[name].read(row, columns)


def chat(*turns, **fields):
    return {"messages": list(turns), **fields}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "gpt", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "type", "text", "weight", "train", "tool_calls", "thinking"]
            ),
            inner,
        )
    ),
    max_leaves=10,
)
fields = st.sampled_from(
    "a b messages conversations prompt completion instruction input output text system history tools".split()
)
any_row = st.dictionaries(fields, json_values, max_size=6)
