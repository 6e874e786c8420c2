"""How much there is to do: steps, tokens and attention of a run, from the plan of its rows or from what the user says."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sft_jax.batch import Batch
from sft_jax.config import Config
from sft_jax.data.prepare import prepare
from sft_jax.errors import UserError
from sft_jax.model.spec import LayerSpec
from sft_jax.training.adapting import tokenizer_place
from sft_jax.training.hardware import attention_pairs

_SAMPLE = 256  # rows that are read to see how long documents are


@dataclass(frozen=True)
class Work:
    """The work of a run, on average over its rows."""

    steps: int | None  # None: not known, since there are no data and train.steps is not set
    tokens: float  # real ones, in a row
    supervised: float  # positions with weight, in a row
    pairs: float  # (query, key) that attention looks at in a row, on average over layers
    told: str  # where these numbers are from


def work_of(
    config: Config, layers: tuple[LayerSpec, ...], vocab_size: int, tokens: float | None, log: Callable[[str], None]
) -> Work:
    """Returns the work of the run of `config`.

    Args:
        tokens: Real tokens of an epoch, in place of the data; None: data.train is prepared as for training. With neither,
            rows are taken to be full, and steps are those of `train.steps`.
    """
    length = config.data.max_length
    if tokens is None and config.data.train:
        data = prepare(
            config.data, model_path=str(tokenizer_place(config)), vocab_size=vocab_size, seed=config.seed,
            epochs=config.train.epochs, rows=config.train.steps * config.train.batch_size, normalize=config.train.normalize, log=log,
        ).train  # fmt: skip
        rows = data.total_rows
        pairs = attention_pairs(data.read(0, min(rows, _SAMPLE)), layers) / min(rows, _SAMPLE) / len(layers)
        return Work(
            math.ceil(rows / config.train.batch_size), data.real_tokens / rows, data.supervised_tokens / rows, pairs,
            f"{data.real_tokens:,} real tokens, {data.supervised_tokens:,} supervised, in {rows:,} rows of {length} (data.train)",
        )  # fmt: skip
    if tokens is not None and not tokens > 0:
        raise UserError(f"--tokens: must be above 0, not {tokens:g}.")
    steps = config.train.steps or None
    told = "full rows of one document each, all supervised, were assumed (no data.train)"
    if tokens is not None:
        rows = math.ceil(tokens * config.train.epochs / length)
        steps = steps or math.ceil(rows / config.train.batch_size)
        told = f"{tokens:,.0f} tokens an epoch (--tokens) in full rows of one document each, all supervised"
    return Work(steps, length, length, _full_pairs(length, layers), told)


def _full_pairs(length: int, layers: tuple[LayerSpec, ...]) -> float:
    """Returns the pairs of a row that is one document, on average over layers."""
    row = np.ones((1, length), np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    return attention_pairs(Batch(row, row, row, row, positions, row), layers) / len(layers)
