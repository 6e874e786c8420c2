"""Rows that are built for tests, and which of their text is supervised."""

import numpy as np

from sft_jax.data.chats.chat import build_rows
from sft_jax.data.chats.templates import TEMPLATES, ChatTemplate
from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation, Message


def chat(*texts, **fields):
    turns = [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    return Conversation(messages=tuple(turns), **fields)


def build(tokenizer, template, *conversations, **options):
    source = TEMPLATES.get(template, template)
    compiled = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
    return build_rows(conversations, tokenizer, compiled, **options)


def supervised(tokenizer, example, above=0.0):
    """Returns the texts of the supervised stretches."""
    on = np.concatenate([[False], example.weights > above, [False]])
    edges = np.flatnonzero(on[1:] != on[:-1]).reshape(-1, 2).tolist()
    return [tokenizer.decode(example.ids[:end])[len(tokenizer.decode(example.ids[:start])) :] for start, end in edges]


def texts_of(tokenizer, row):
    assert not isinstance(row, BadRow), row
    return [(example.turn, supervised(tokenizer, example)) for example in row.examples]
