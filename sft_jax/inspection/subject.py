"""What is looked at: the prepared data of a run, and for each data set its rows, its store and how rows are read."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sft_jax.config import Config, DataConfig, DataSetConfig, data_set_key
from sft_jax.data.chats.templates import template_source
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.prepare import PreparedData, cache_folder, day_of, prepare
from sft_jax.data.sources.registry import Rows, open_rows
from sft_jax.data.stores.circumstances import Circumstances
from sft_jax.data.stores.row_builder import SetOptions, Setup
from sft_jax.data.stores.store import Store
from sft_jax.data.stores.tokenizer_cache import open_tokenizer
from sft_jax.inspection.overlength import Shortened, shortened


@dataclass(frozen=True, eq=False)
class InspectedSet:
    """One set of data.train or data.eval."""

    split: str  # "train" or "eval"
    number: int  # among all sets
    key: str  # such as "data.train.gsm8k", for messages
    config: DataSetConfig  # as configured
    rows: Rows
    stream: RowStream  # that its documents are in
    index: int  # of the set in the stream's corpus

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def store(self) -> Store:
        return self.stream.corpus.stores[self.index]

    @property
    def first(self) -> int:
        """The number of its first example in the stream's corpus."""
        return int(self.stream.corpus.bases[self.index])

    def examples_of(self, row: int) -> range:
        """Returns the numbers in the stream's corpus of the examples of a row."""
        low, high = np.searchsorted(self._rows_of, [row, row + 1]).tolist()
        return range(self.first + low, self.first + high)

    @functools.cached_property
    def _rows_of(self) -> np.ndarray:
        """The number of the row of every example of the store, ascending."""
        return self.store.rows.whole()

    @functools.cached_property
    def shortened(self) -> Shortened:
        """What the over-length policy makes of each of its examples."""
        return shortened(self.stream, self.index, self.config.overlength, self.config.cap)


@dataclass(frozen=True, eq=False)
class Subject:
    """The data of a run, ready to be looked at."""

    config: DataConfig
    data: PreparedData
    sets: tuple[InspectedSet, ...]  # those of data.train, then those of data.eval
    setup: Setup  # of worker processes


def open_subject(config: Config, model_path: str, vocab_size: int | None, log: Callable[[str], None]) -> Subject:
    """Prepares the data of a run as training would, but goes on where training stops at a row.

    Rows that cannot be used are left out and listed whatever data.bad_rows is. Under data.overlength=error, which allows
    no example that is too long, packed rows are those of "split". Weights are those before train.normalize.

    Args:
        model_path: directory or hub id with the tokenizer.
        vocab_size: tokens that the model has; None where there is no model to check the data against.
        log: takes lines about what is done.

    Raises UserError as `prepare` does: for a wrong path or key, and for a set of which no row can be used.
    """
    asked = config.data
    lenient = dataclasses.replace(asked, bad_rows="skip", train=_allowed(asked.train), eval=_allowed(asked.eval))
    rows = config.train.steps * config.train.batch_size
    date = day_of(asked)
    data = prepare(
        lenient, model_path=model_path, vocab_size=vocab_size, seed=config.seed, epochs=config.train.epochs, rows=rows,
        rendered_at=date.isoformat(), log=log,
    )  # fmt: skip
    tokenizer, tokenizer_folder = open_tokenizer(model_path, cache_folder(asked), asked.add_tokens)
    sets: list[InspectedSet] = []
    for split, items in (("train", asked.train), ("eval", asked.eval)):
        for index, item in enumerate(items):
            key = data_set_key(split, index, item.name, len(items))
            stream, place = (data.train, index) if split == "train" else (data.eval[item.name], 0)
            sets.append(InspectedSet(split, len(sets), key, item, open_rows(item.path, key, cache_folder(asked), log), stream, place))
    options = tuple(SetOptions(item.store.meta["format"], item.config.columns, item.config.supervise) for item in sets)
    now = Circumstances(date, asked.row_timeout, asked.row_memory_mb).now
    setup = Setup(
        str(tokenizer_folder), template_source(asked.chat_template, tokenizer), now, asked.chat_template_kwargs,
        asked.allow_special_tokens_in_content, options, checked=True,
    )  # fmt: skip
    return Subject(asked, data, tuple(sets), setup)


def _allowed(sets: tuple[DataSetConfig, ...]) -> tuple[DataSetConfig, ...]:
    return tuple(dataclasses.replace(item, overlength="split") if item.overlength == "error" else item for item in sets)
