"""Preparing data: files of rows in, streams of packed rows out, through a store that is used again.

What comes before the store (reading, rendering, tokenising) happens once for the same data, template and tokenizer;
what comes after it (over-length policy, mixture, packing) takes seconds and happens at every start.
"""

import datetime
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft_jax.config import DataConfig, DataSetConfig
from sft_jax.data import build, row_builder
from sft_jax.data.corpus import Corpus
from sft_jax.data.data_report import describe_set, describe_stream
from sft_jax.data.fingerprint import combine, folder_hash, tokenizer_files_fingerprint, tokens_fingerprint
from sft_jax.data.formats import resolve_format
from sft_jax.data.overlength import apply_overlength
from sft_jax.data.pipeline import RowStream
from sft_jax.data.sources import Rows, open_rows
from sft_jax.data.store import Store, StoreDamaged, open_store
from sft_jax.data.store_writer import disk_errors, remove_store
from sft_jax.data.templates import template_source
from sft_jax.data.tokens import Tokenizer, load_stored_tokenizer, load_tokenizer, store_tokenizer
from sft_jax.data.threads import ThreadPool
from sft_jax.data.workers import Failure, WorkerPool
from sft_jax.errors import UserError

Log = Callable[[str], None]
_CHECKSUM = "checksum"  # of the files of a stored tokenizer


@dataclass(frozen=True)
class PreparedData:
    """Everything that training and evaluation need of the data."""

    train: RowStream
    eval: dict[str, RowStream]  # by name, in the order of the configuration
    tokenizer: Tokenizer
    report: dict[str, Any]  # for data_report.json
    fingerprints: dict[str, str]  # "tokens", "eval", "tokenizer", "plan"


@dataclass
class _Set:
    """One data set on its way."""

    key: str  # such as "data.train.gsm8k", for messages
    config: DataSetConfig
    rows: Rows
    fingerprint: str
    folder: Path
    store: Store | None = None


def prepare(
    config: DataConfig,
    *,
    model_path: str,
    seed: int = 0,
    epochs: float = 1.0,
    rows: int = 0,
    normalize: Literal["tokens", "examples"] = "tokens",
    log: Log = print,
) -> PreparedData:
    """Returns the prepared data.

    Args:
        model_path: directory or hub id with the model's tokenizer and chat template.
        seed: of the order of the training rows.
        epochs: passes over the training data; a fraction is rounded up to whole rows.
        rows: when above 0, exactly so many training rows, whatever `epochs` says.
        normalize: "examples" gives every training example the same weight, "tokens" every supervised token. Held-out
            loss is always per token.
        log: takes lines about what is done.

    Raises UserError, naming file and line or key and the remedy, for every kind of input that cannot be used.
    """
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache()
    opened = [  # before the tokenizer, which may take seconds to load: a wrong path is told at once
        (split, item, open_rows(item.path, f"data.{split}.{item.name}"))
        for split in ("train", "eval")
        for item in getattr(config, split)
    ]
    tokenizer, tokenizer_folder = open_tokenizer(model_path, cache)
    tokenizer_hash = tokenizer.fingerprint  # of megabytes, so once
    template = template_source(config.chat_template, tokenizer)
    sets: dict[str, list[_Set]] = {"train": [], "eval": []}
    for split, item, files in opened:
        fingerprint = tokens_fingerprint(
            data=files.fingerprint, format=item.format, columns=item.columns, supervise=item.supervise,
            template=template[0] if template else None, template_kwargs=config.chat_template_kwargs,
            allow_special_tokens=config.allow_special_tokens_in_content, tokenizer=tokenizer_hash,
        )  # fmt: skip
        sets[split].append(_Set(f"data.{split}.{item.name}", item, files, fingerprint, cache / "tokens" / fingerprint))
    everything = sets["train"] + sets["eval"]
    _find_stores(everything, config, log)
    missing = {item.fingerprint: item for item in everything if item.store is None}
    if missing:
        _build(list(missing.values()), config, tokenizer, tokenizer_folder, template, log)
    for item in everything:
        if item.store is None:
            item.store = _open_built(item)

    corpus = Corpus([item.config.name for item in sets["train"]], [item.store for item in sets["train"]])
    documents, report = _apply_overlength(corpus, sets["train"], config.max_length)
    train = RowStream(
        corpus, documents, max_length=config.max_length, max_segments=config.max_segments, packing=config.packing,
        weights=[item.config.weight for item in sets["train"]], seed=seed, epochs=epochs, rows=rows,
        normalize=normalize, fingerprints=[item.fingerprint for item in sets["train"]],
    )  # fmt: skip
    reports: dict[str, Any] = {"train": {"sets": report, "stream": describe_stream(train)}, "eval": {}}
    held_out = {}
    for item in sets["eval"]:
        name = item.config.name
        corpus = Corpus([name], [item.store])
        documents, report = _apply_overlength(corpus, [item], config.max_length)
        held_out[name] = RowStream(
            corpus, documents, max_length=config.max_length, max_segments=config.max_segments, packing=config.packing,
            shuffle=False, fingerprints=[item.fingerprint],
        )  # fmt: skip
        reports["eval"][name] = {**report[name], "stream": describe_stream(held_out[name])}
    fingerprints = {
        "tokens": combine({item.config.name: item.fingerprint for item in sets["train"]}),
        "eval": combine({item.config.name: item.fingerprint for item in sets["eval"]}),
        "tokenizer": tokenizer_hash,
        "plan": train.plan_hash,
    }
    return PreparedData(train, held_out, tokenizer, {**reports, "fingerprints": fingerprints}, fingerprints)


def default_cache() -> Path:
    """Returns the user's cache folder for prepared data."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sft_jax"


def open_tokenizer(model_path: str, cache: Path) -> tuple[Tokenizer, Path]:
    """Returns the tokenizer of a model, and the folder in `cache` where it is stored for workers and later starts.

    The stored one is used while the files of a model directory and the library that reads them stay the same; then
    transformers, which takes seconds to import, is not needed. The tokenizer of a hub id is always loaded.
    """
    source = Path(model_path).expanduser()
    folder = cache / "tokenizers" / tokenizer_files_fingerprint(source) if source.is_dir() else None
    if folder is not None and _is_whole(folder):
        return load_stored_tokenizer(folder), folder
    tokenizer = load_tokenizer(model_path)
    if folder is None:
        folder = cache / "tokenizers" / tokenizer.fingerprint[:32]
        if _is_whole(folder):
            return tokenizer, folder
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp.", dir=folder.parent))
        try:
            store_tokenizer(tokenizer, temporary)
            (temporary / _CHECKSUM).write_text(folder_hash(temporary))
            if folder.is_dir():
                shutil.rmtree(folder)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not _is_whole(folder):  # else another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return tokenizer, folder


def _is_whole(folder: Path) -> bool:
    """Returns whether a stored tokenizer is there as it was written."""
    checksum = folder / _CHECKSUM
    return checksum.is_file() and checksum.read_text() == folder_hash(folder, leave_out=_CHECKSUM)


def _find_stores(sets: list[_Set], config: DataConfig, log: Log) -> None:
    """Opens the stores that are there. A damaged one is named and removed."""
    for item in sets:
        try:
            item.store = open_store(item.folder)
        except StoreDamaged as error:
            log(f"{item.key}: the prepared data are damaged and are made again: {error}.")
            remove_store(item.folder)
        if item.store is not None:
            item.store.file_names = list(item.rows.names)
            if item.store.bad_rows and config.bad_rows == "error":  # it was made under another policy
                raise build.bad_rows_error(item.key, item.store.bad_rows, item.rows, len(item.rows))
            log(f"{item.key}: {len(item.rows):,} rows were prepared before ({item.folder}).")


def _open_built(item: _Set) -> Store:
    try:
        store = open_store(item.folder)
    except StoreDamaged as error:
        raise UserError(f"{error} although it has just been written; check the disk, or set data.cache_dir.") from error
    if store is None:
        raise UserError(f"{item.folder}: vanished after it was written; does something clean data.cache_dir?")
    store.file_names = list(item.rows.names)
    return store


def _build(sets: list[_Set], config: DataConfig, tokenizer: Tokenizer, folder: Path, template, log: Log) -> None:
    """Prepares the data sets of which there is no store."""
    now = datetime.datetime.now()
    options = []
    for item in sets:
        format_ = resolve_format(item.config.format, item.rows, item.config.columns, config.bad_rows == "skip")
        options.append(row_builder.SetOptions(format_, item.config.columns, item.config.supervise))
    setup = row_builder.Setup(
        str(folder), template, now, config.chat_template_kwargs, config.allow_special_tokens_in_content, tuple(options)
    )
    count = min(config.workers or _cores(), sum(-(-len(item.rows) // build.CHUNK) for item in sets))
    with _pool(setup, count, config, tokenizer) as pool:
        _check_options(pool, sets, template)
        if isinstance(pool, WorkerPool):
            pool.setup = setup._replace(checked=True)  # of workers that start later
        for index, (item, option) in enumerate(zip(sets, options, strict=True)):
            log(f"{item.key}: preparing {len(item.rows):,} rows of format '{option.format}' with {count} {pool.of}.")
            build.build_store(
                item.folder, item.rows, index, pool, what=item.key, vocab_size=tokenizer.vocab_size,
                bad_rows=config.bad_rows, meta={"format": option.format, "rendered_at": now.isoformat()}, log=log,
            )  # fmt: skip


def _pool(setup: row_builder.Setup, count: int, config: DataConfig, tokenizer: Tokenizer) -> WorkerPool | ThreadPool:
    """Returns processes under the watchdog where a template is rendered, and threads where none of the user's code runs."""
    if setup.template is None and tokenizer.concurrent:
        return ThreadPool(row_builder.make_builder(setup, tokenizer), count)
    return WorkerPool(row_builder.TARGET, setup, count, config.row_timeout, config.row_memory_mb)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_options(pool: WorkerPool, sets: list[_Set], template: tuple[str, str] | None) -> None:
    """Compiles and probes the template in a worker. Raises UserError where that fails, and for wrong options."""
    for index, item in enumerate(sets):
        for _, outcome in pool.run([[row_builder.Item(index, 0, None)]]):
            if isinstance(outcome, Failure):
                if outcome.kind == "refused":
                    raise UserError(outcome.reason)
                name = template[1] if template else item.key
                raise UserError(f"{name}: preparing for it {build.describe(outcome)} Check data.chat_template.")


def _apply_overlength(corpus: Corpus, sets: list[_Set], max_length: int):
    """Returns (documents of each set, report of each set by name)."""
    documents, reports = [], {}
    for index, item in enumerate(sets):
        found, counts = apply_overlength(corpus, index, item.config.overlength, max_length, item.key)
        if not len(found):
            raise UserError(
                f"{item.key}: nothing is left of it, since all of its {len(item.store):,} examples are longer than "
                f"data.max_length {max_length} and data.overlength is '{item.config.overlength}'; raise "
                "data.max_length or choose another policy."
            )
        documents.append(found)
        reports[item.config.name] = describe_set(corpus, index, found, counts)
    return documents, reports
