"""The stores of data sets: those that are there are found, the others are made."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft_jax.config import DataConfig, DataSetConfig
from sft_jax.data.formats.detection import resolve_format
from sft_jax.data.sources.registry import Rows
from sft_jax.data.stores import build, row_builder
from sft_jax.data.stores.circumstances import Circumstances
from sft_jax.data.stores.store import Store, StoreDamaged, open_store
from sft_jax.data.stores.store_writer import remove_manifest
from sft_jax.data.stores.workers import Failure, WorkerPool
from sft_jax.data.tokenizers.vocabulary import Vocabulary
from sft_jax.errors import UserError

Log = Callable[[str], None]
Template = tuple[str, str] | None  # source, name for messages


@dataclass
class DataSet:
    """One data set on its way."""

    key: str  # such as "data.train.gsm8k", for messages
    config: DataSetConfig
    rows: Rows
    fingerprint: str  # of what its store depends on under any circumstances
    store: Store | None = None


@dataclass(frozen=True)
class StoreMaker:
    """What all data sets of a run are prepared with."""

    config: DataConfig
    parent: Path  # folder of all stores
    vocabulary: Vocabulary
    tokenizer_folder: Path
    template: Template
    circumstances: Circumstances
    log: Log
    part: build.Part = build.Part()

    def open_all(self, sets: list[DataSet]) -> bool:
        """Gives every set its store, from the cache or made now; of several parts only this one's shards are made.

        Returns whether every set has its store: else other parts are not ready. Raises UserError where that cannot be.
        """
        for item in sets:
            if self._find(item):
                self.log(f"{item.key}: {len(item.rows):,} rows were prepared before ({item.store.folder}).")
        missing = {item.fingerprint: item for item in sets if item.store is None}
        if missing and not self._build(list(missing.values())):
            return False
        for item in sets:
            if item.store is None and not self._find(item):
                raise UserError(
                    f"{self.parent / item.fingerprint}: vanished or was damaged after it was written; check the disk and "
                    "what cleans data.cache_dir, or set it to another folder."
                )
        day = self.circumstances.rendered_at
        if day != datetime.date.today() and any(day.isoformat() in item.store.name for item in sets):
            self.log(f"{self.template[1]} writes the date: {day}, which is data.date or the day on which this run began.")
        return True

    def _find(self, item: DataSet) -> bool:
        """Opens the store of a set if it is there. A damaged one is named and removed."""
        folder = self.parent / item.fingerprint
        for suffix in self.circumstances.suffixes():
            try:
                item.store = open_store(folder, suffix)
            except StoreDamaged as error:
                self.log(f"{item.key}: the prepared data are damaged: {error}. What is whole of them is used again.")
                remove_manifest(folder, suffix)
            if item.store is not None:
                break
        else:
            return False
        item.store.file_names = list(item.rows.names)
        if item.store.bad_rows and self.config.bad_rows == "error":  # it was made under another policy
            raise build.bad_rows_error(item.key, item.store.bad_rows, item.rows, len(item.rows))
        largest = item.store.meta["largest"]
        self.vocabulary.check(largest["id"], item.rows.names[largest["file"]], largest["line"])
        return True

    def _build(self, sets: list[DataSet]) -> bool:
        """Prepares the data sets of which there is no store. Returns whether each has one now."""
        config = self.config
        options = []
        for item in sets:
            format_ = resolve_format(item.config.format, item.rows, item.config.columns, config.bad_rows == "skip")
            options.append(row_builder.SetOptions(format_, item.config.columns, item.config.supervise))
        setup = row_builder.Setup(
            str(self.tokenizer_folder), self.template, self.circumstances.now, config.chat_template_kwargs,
            config.allow_special_tokens_in_content, tuple(options),
        )  # fmt: skip
        count = min(config.workers or cores(), sum(-(-len(item.rows) // build.CHUNK) for item in sets))
        with WorkerPool(row_builder.TARGET, setup, count, config.row_timeout, config.row_memory_mb) as pool:
            self._check_options(pool, sets)
            pool.setup = setup._replace(checked=True)  # of workers that start later
            whole = True
            for index, (item, option) in enumerate(zip(sets, options, strict=True)):
                self.log(
                    f"{item.key}: preparing {len(item.rows):,} rows of format '{option.format}' with {count} process(es)."
                )
                builder = build.StoreBuilder(
                    self.parent / item.fingerprint, self.circumstances, item.rows, index, pool, item.key, self.vocabulary,
                    config.bad_rows, self.part, self.log,
                )  # fmt: skip
                whole &= builder.build({"format": option.format})
        return whole

    def _check_options(self, pool: WorkerPool, sets: list[DataSet]) -> None:
        """Compiles the template in a worker. Raises UserError where that fails, and for wrong options."""
        for index, item in enumerate(sets):
            for _, outcome in pool.run([[row_builder.Item(index, 0, None)]]):
                if isinstance(outcome, Failure):
                    if outcome.kind == "refused":
                        raise UserError(outcome.reason)
                    name = self.template[1] if self.template else item.key
                    raise UserError(f"{name}: preparing for it {build.describe(outcome)} Check data.chat_template.")


def cores() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
