"""A model, rows, and `prepare` with a cache of its own, for tests of preparation."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from sft_jax.config_parsing import parse_config
from sft_jax.data.prepare import prepare
from sft_jax.data.stores import maker as stores
from sft_jax.data.tokenizers.tokens import load_tokenizer
from sft_jax.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model directory whose tokenizer is a small SentencePiece model: read without transformers."""
    folder = tmp_path_factory.mktemp("model")
    corpus = [
        f"The {a} {b} says {i * 7919 % 1000} to the {b} of {a}."
        for i, (a, b) in enumerate([("red", "fox"), ("old", "owl")] * 50)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(str(model))


def pairs(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["red", "fox", "old", "owl", "says", "9", "é"]

    def text(most):
        return " ".join(words[i] for i in rng.integers(0, len(words), rng.integers(1, most)))

    return [{"prompt": f"Question {i}: {text(20)}?", "completion": " " + text(12)} for i in range(count)]


def chats(count):
    return [
        {"messages": [turn("user", f"What says fox {i}?"), turn("assistant", f"To the owl: {i * i}.")]}
        for i in range(count)
    ]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def write(path: Path, rows) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path, model):
    """Runs prepare with a cache of its own, one worker and given keys of `data`."""
    lines: list[str] = []

    def go(train, *, model_path=None, options=None, **data):
        fixed = {"cache_dir": str(tmp_path / "cache"), "max_length": 128, "workers": 1, "chat_template": "none"}
        config = parse_config({"model": {"path": "m"}, "data": {"train": train, **fixed, **data}}).data
        return prepare(config, model_path=str(model_path or model), log=lines.append, **(options or {}))

    go.lines = lines
    go.cache = tmp_path / "cache"
    return go


@pytest.fixture
def no_workers(monkeypatch):
    """Fails the test where rows are prepared again."""

    def refuse(*args, **kwargs):
        raise AssertionError("rows are prepared again")

    def forbid():
        monkeypatch.setattr(stores, "WorkerPool", refuse)

    return forbid


def first_text(data) -> str:
    return data.tokenizer.decode(data.train.document(0)[1].tolist())


def fails(run, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        run(*args, **kwargs)
    assert not list(run.cache.glob("tokens/*/manifest*"))  # nothing is left that could be taken for prepared data
    assert not list(run.cache.glob("tokens/*/*.tmp.*"))
    return str(caught.value)
