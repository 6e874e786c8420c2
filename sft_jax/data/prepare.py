"""Preparing data: files of rows in, streams of packed rows out, through a store that is used again.

What comes before the store (reading, rendering, tokenising) happens once for the same data, template and tokenizer;
what comes after it (over-length policy, mixture, packing) takes seconds and happens at every start.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sft_jax.config import DataConfig, data_set_key
from sft_jax.data.cache import default_cache
from sft_jax.data.chats.templates import template_source
from sft_jax.data.data_report import describe_set, describe_stream
from sft_jax.data.packing.cap import apply_cap
from sft_jax.data.packing.corpus import Corpus
from sft_jax.data.packing.mixture import documents_an_epoch
from sft_jax.data.packing.overlength import apply_overlength
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.sources.registry import open_rows
from sft_jax.data.stores.build import Part
from sft_jax.data.stores.circumstances import Circumstances
from sft_jax.data.stores.fingerprint import combine, tokens_fingerprint
from sft_jax.data.stores.maker import DataSet, StoreMaker
from sft_jax.data.stores.tokenizer_cache import open_tokenizer
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.data.tokenizers.vocabulary import Vocabulary
from sft_jax.errors import UserError

Log = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    """Everything that training and evaluation need of the data."""

    train: RowStream
    eval: dict[str, RowStream]  # by name, in the order of the configuration
    tokenizer: Tokenizer
    report: dict[str, Any]  # for data_report.json
    fingerprints: dict[str, str]  # "tokens", "eval", "tokenizer", "plan"
    row_fingerprints: dict[str, str]  # of the files of each training set, by name
    stores: dict[str, Path]  # where the prepared rows of each set lie, by its key, such as "data.train.gsm8k"
    rendered_at: str  # the day that templates took for today, to be given to `prepare` when the run goes on


def prepare(
    config: DataConfig,
    *,
    model_path: str,
    vocab_size: int | None = None,
    seed: int = 0,
    epochs: float = 1.0,
    rows: int = 0,
    normalize: Literal["tokens", "examples"] = "tokens",
    rendered_at: str | None = None,
    log: Log = print,
) -> PreparedData:
    """Returns the prepared data.

    Args:
        model_path: directory or hub id with the model's tokenizer and chat template.
        vocab_size: token ids that the model has, from 0 on; None where there is no model to check the data against.
        seed: of the order of the training rows, and of the sample of a set with a cap; that of a held-out set is always
            the same.
        epochs: passes over the training data; a fraction is rounded up to whole rows.
        rows: when above 0, exactly so many training rows, whatever `epochs` says.
        normalize: "examples" gives every training example the same weight, "tokens" every supervised token. Held-out
            loss is always per token.
        rendered_at: the day, such as "2026-01-31", that templates take for today; None is data.date, else today. A run
            that goes on gives the day it began, since a template that writes the date makes other tokens on another day.
        log: takes lines about what is done.

    Raises UserError, naming file and line or key and the remedy, for every kind of input that cannot be used.
    """
    opened = _open_sets(config, model_path, vocab_size, rendered_at, Part(), log)
    tokenizer, train_sets = opened.tokenizer, opened.train
    unused = [text for text in config.add_tokens if not any(item.store.meta["added_tokens"][text] for item in train_sets)]
    if unused:
        log(
            f"data.add_tokens: no training row holds {', '.join(map(repr, unused))}, so its use is not learned. A chat template must "
            "write it; content never becomes a control token unless data.allow_special_tokens_in_content is set."
        )

    corpus = Corpus([item.config.name for item in train_sets], [item.store for item in train_sets])
    documents, report = _documents_of(corpus, train_sets, config.max_length, seed)
    train = RowStream(
        corpus, documents, max_length=config.max_length, max_segments=config.max_segments, packing=config.packing,
        weights=[item.config.weight for item in train_sets], weight_by=config.weight_by,
        set_epochs=[item.config.epochs for item in train_sets], seed=seed, epochs=epochs, rows=rows, normalize=normalize, log=log,
    )  # fmt: skip
    reports: dict[str, Any] = {"train": {"sets": report, "stream": describe_stream(train)}}
    held_out, reports["eval"] = _held_out(opened, config)
    fingerprints = {
        "tokens": combine({item.config.name: item.store.name for item in train_sets}),
        "eval": combine({item.config.name: item.store.name for item in opened.eval}),
        "tokenizer": opened.tokenizer_hash,
        "plan": train.plan_hash,
    }
    report = {**reports, "fingerprints": fingerprints, "rendered_at": opened.date.isoformat()}
    row_fingerprints = {item.config.name: item.rows.fingerprint for item in train_sets}
    stores = {item.key: item.store.folder for item in (*opened.train, *opened.eval)}
    return PreparedData(train, held_out, tokenizer, report, fingerprints, row_fingerprints, stores, opened.date.isoformat())


@dataclass(frozen=True)
class HeldOutData:
    """The part of the prepared data that evaluation needs."""

    eval: dict[str, RowStream]  # by name, in the order of the configuration
    tokenizer: Tokenizer
    fingerprint: str


def prepare_held_out(
    config: DataConfig, *, model_path: str, vocab_size: int | None = None, rendered_at: str | None = None, log: Log = print
) -> HeldOutData:
    """Returns the prepared data of data.eval alone: the rows that a run with them evaluates, whatever it is trained on.

    Arguments and errors are those of `prepare`.
    """
    opened = _open_sets(replace(config, train=()), model_path, vocab_size, rendered_at, Part(), log)
    held_out, _ = _held_out(opened, config)
    return HeldOutData(held_out, opened.tokenizer, combine({item.config.name: item.store.name for item in opened.eval}))


def prepare_part(
    config: DataConfig,
    *,
    model_path: str,
    part: Part,
    vocab_size: int | None = None,
    rendered_at: str | None = None,
    log: Log = print,
) -> bool:
    """Prepares what is one process's part of all data sets, into the cache folder that all processes share.

    Returns whether everything is prepared now; else other parts are still missing, and whichever ends last completes the
    stores. Arguments and errors are those of `prepare`, and UserError where a template writes the date and neither
    `rendered_at` nor data.date says which it is, since other processes may begin on another day.
    """
    part = part._replace(same_day=bool(rendered_at or config.date) or part.count == 1)
    return _open_sets(config, model_path, vocab_size, rendered_at, part, log).complete


def _held_out(opened: "_Opened", config: DataConfig) -> tuple[dict[str, RowStream], dict[str, Any]]:
    """Returns the stream of each held-out set, in which every document comes up once, and what is reported of it."""
    streams, reports = {}, {}
    for item in opened.eval:
        name = item.config.name
        corpus = Corpus([name], [item.store])
        documents, report = _documents_of(corpus, [item], config.max_length, seed=0)
        streams[name] = RowStream(
            corpus, documents, max_length=config.max_length, max_segments=config.max_segments, packing=config.packing,
            shuffle=False,
        )  # fmt: skip
        reports[name] = {**report[name], "stream": describe_stream(streams[name])}
    return streams, reports


@dataclass(frozen=True)
class _Opened:
    """Data sets with their stores, where `complete`."""

    train: list[DataSet]
    eval: list[DataSet]
    tokenizer: Tokenizer
    tokenizer_hash: str
    date: datetime.date
    complete: bool


def _open_sets(
    config: DataConfig, model_path: str, vocab_size: int | None, rendered_at: str | None, part: Part, log: Log
) -> _Opened:
    cache = cache_folder(config)
    opened = [  # before the tokenizer, which may take seconds to load: a wrong path is told at once
        (split, key, item, open_rows(item.path, key, cache, log))
        for split, items in (("train", config.train), ("eval", config.eval))
        for index, item in enumerate(items)
        for key in [data_set_key(split, index, item.name, len(items))]
    ]
    tokenizer, tokenizer_folder = open_tokenizer(model_path, cache, config.add_tokens)
    tokenizer_hash = tokenizer.fingerprint  # of megabytes, so once
    template = template_source(config.chat_template, tokenizer)
    date = day_of(config, rendered_at)
    sets: dict[str, list[DataSet]] = {"train": [], "eval": []}
    for split, key, item, files in opened:
        fingerprint = tokens_fingerprint(
            data=files.fingerprint, format=item.format, columns=item.columns, supervise=item.supervise,
            template=template[0] if template else None, template_kwargs=config.chat_template_kwargs,
            allow_special_tokens=config.allow_special_tokens_in_content, tokenizer=tokenizer_hash,
            add_tokens=config.add_tokens,
        )  # fmt: skip
        sets[split].append(DataSet(key, item, files, fingerprint))
    circumstances = Circumstances(date, config.row_timeout, config.row_memory_mb)
    vocabulary = Vocabulary(vocab_size, tokenizer, model_path, config.add_tokens)
    maker = StoreMaker(config, cache / "tokens", vocabulary, tokenizer_folder, template, circumstances, log, part)
    complete = maker.open_all(sets["train"] + sets["eval"])
    return _Opened(sets["train"], sets["eval"], tokenizer, tokenizer_hash, date, complete)


def day_of(config: DataConfig, rendered_at: str | None = None) -> datetime.date:
    """Returns the day that templates take for today: that on which a run has begun, else data.date, else today."""
    known = rendered_at or config.date
    return datetime.date.fromisoformat(known) if known else datetime.date.today()


def cache_folder(config: DataConfig) -> Path:
    """Returns the folder in which prepared data are kept."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else default_cache()


def _documents_of(corpus: Corpus, sets: list[DataSet], max_length: int, seed: int):
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
        found, beyond_cap = apply_cap(corpus, index, found, item.config.cap, seed)
        if documents_an_epoch(len(found), item.config.epochs) < 1:
            raise UserError(
                f"{item.key}.epochs: {item.config.epochs:g} of its {len(found):,} documents is less than one in an epoch; raise it "
                f"to 1/{len(found)} or more."
            )
        documents.append(found)
        reports[item.config.name] = describe_set(corpus, index, found, counts, beyond_cap)
    return documents, reports
