"""From the rows of one data set to a store: rows go to workers in chunks, what comes back is written in order."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.data.circumstances import Circumstances
from sft_jax.data.examples import RowError
from sft_jax.data.row_builder import Built, Item
from sft_jax.data.sources import Rows
from sft_jax.data.store_writer import StoreWriter
from sft_jax.data.vocabulary import Vocabulary
from sft_jax.data.workers import Failure, WorkerPool
from sft_jax.errors import UserError

CHUNK = 256  # rows that a worker does at a time
LOOK_AHEAD = 10_000  # rows read on after the first bad one, to say how many there are
WATCHDOG_ROWS = 20  # rows that may run into the watchdog before the template or the data as a whole is to blame
FIELDS_NAMED = 100  # unused fields that are counted by name, the most frequent; data may have keys for names
SHOWN = 5  # bad rows that a message names
_PROGRESS_SECONDS = 10.0

BadRowEntry = dict[str, Any]  # row, file (index), line, reason; watched: the watchdog ended it, so a limit decided


def build_store(
    parent: Path,
    fingerprint: str,
    circumstances: Circumstances,
    rows: Rows,
    set_index: int,
    pool: WorkerPool,
    *,
    what: str,
    vocabulary: Vocabulary,
    bad_rows: str,
    meta: dict[str, Any],
    log: Callable[[str], None],
) -> None:
    """Prepares every row of a data set and writes its store, see sft_jax.data.circumstances for its name.

    Args:
        parent: folder of all stores.
        fingerprint: of what the store depends on under any circumstances.
        set_index: of the set in the setup of the pool's workers, see sft_jax.data.row_builder.
        what: names the set in messages, such as "data.train.gsm8k".
        vocabulary: of the model; a row with a token that the model has not stops the build.
        bad_rows: "error" stops at rows that cannot be used, "skip" writes them into the store's list.
        meta: goes into the store's manifest, with the counts.

    Raises UserError naming file and line of the first bad rows under "error"; under any policy when no row can be
    used, or when many rows run into the watchdog, which costs its whole time for each.
    """
    bad: list[BadRowEntry] = []
    kinds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    used = done = watchdog = 0
    read_clock = False
    largest = {"id": -1, "file": 0, "line": 0}  # token id, and the first row that has it
    added = {text: vocabulary.tokenizer.added_tokens[text] for text in vocabulary.add_tokens}
    added_counts: Counter[str] = Counter()
    file_numbers = {name: index for index, name in enumerate(rows.names)}
    reported = time.monotonic()

    def place(number: int) -> tuple[int, int]:
        where = rows.where(number)
        return file_numbers[where.file], where.line

    with StoreWriter(parent / fingerprint, vocabulary.tokenizer.vocab_size) as writer:
        for count, encoded, found in _results(rows, set_index, pool):
            done += count
            for number, reason, watched in found:
                file, line = place(number)
                bad.append({"row": number, "file": file, "line": line, "reason": reason, **({"watched": True} if watched else {})})
                watchdog += watched
            if isinstance(encoded, Built):
                part = encoded.encoded
                places = np.array([place(number) for number in part.rows.tolist()], np.int64).reshape(-1, 2)
                if len(part.ids) and part.ids.max() > largest["id"]:
                    token = int(part.ids.argmax())
                    file, line = places[np.searchsorted(np.cumsum(part.lengths), token, side="right")].tolist()
                    largest = {"id": int(part.ids[token]), "file": file, "line": line}
                    vocabulary.check(largest["id"], rows.names[file], line)
                added_counts.update({text: int(np.sum(part.ids == token)) for text, token in added.items()})
                writer.append(part, places[:, 0], places[:, 1])
                used += sum(encoded.kinds.values())
                kinds.update(encoded.kinds)
                counts.update(encoded.counts)
                unused.update(encoded.unused_fields)
                read_clock |= encoded.read_clock
            if bad and bad_rows == "error" and (watchdog or done - bad[0]["row"] > LOOK_AHEAD):
                break
            if watchdog >= WATCHDOG_ROWS:
                raise UserError(
                    f"{what}: {watchdog} of the first {done:,} rows ran into the limits of data.row_timeout or "
                    f"data.row_memory_mb:{_list_of(bad, rows)}\nCheck the chat template, or raise the limits."
                )
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                log(f"{what}: {done:,} of {len(rows):,} rows prepared.")
        if bad and bad_rows == "error":
            raise bad_rows_error(what, bad, rows, done)
        if not used:
            raise UserError(f"{what}: none of its {len(rows):,} rows can be used:{_list_of(bad, rows)}")
        counted = {"rows": len(rows), "used_rows": used, "kinds": dict(kinds), "counts": dict(counts)}
        counted |= {"unused_fields": dict(unused.most_common(FIELDS_NAMED)), "largest": largest}
        counted["added_tokens"] = dict(added_counts)
        counted["more_unused_fields"] = max(0, len(unused) - FIELDS_NAMED)
        name = circumstances.folder_name(fingerprint, read_clock, watchdog > 0)
        writer.finish(list(rows.names), {**meta, **counted}, bad, parent / name)


def bad_rows_error(what: str, bad: list[BadRowEntry], rows: Rows, done: int) -> UserError:
    """Returns the error for rows that cannot be used. `done` is how many rows have been looked at."""
    of = f"{done:,}" if done == len(rows) else f"the first {done:,}"
    return UserError(
        f"{what}: {len(bad):,} of {of} rows cannot be used:{_list_of(bad, rows)}\n"
        "Correct or remove them, or leave them out, counted, with data.bad_rows=skip."
    )


def _list_of(bad: list[BadRowEntry], rows: Rows) -> str:
    lines = [f"\n  {rows.names[entry['file']]}:{entry['line']}: {entry['reason']}" for entry in bad[:SHOWN]]
    return "".join(lines) + (f"\n  and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else "")


def _results(
    rows: Rows, set_index: int, pool: WorkerPool
) -> Iterator[tuple[int, Built | None, list[tuple[int, str, bool]]]]:
    """Yields (rows done, examples or None, bad rows as (number, reason, whether the watchdog ended it)) in order."""
    unreadable: dict[int, str] = {}

    def chunks() -> Iterator[list[Item]]:
        size = max(1, min(CHUNK, -(-len(rows) // (4 * pool.count))))
        for first in range(0, len(rows), size):
            items = []
            for number, row in enumerate(rows.read(first, min(first + size, len(rows))), first):
                if isinstance(row, RowError):
                    unreadable[number], row = str(row), None
                items.append(Item(set_index, number, row))
            yield items

    for items, outcome in pool.run(chunks()):
        bad = [(item.number, unreadable.pop(item.number), False) for item in items if item.row is None]
        if not isinstance(outcome, Failure):
            bad += [(number, reason, False) for number, reason in outcome.bad]
            yield len(items), outcome, sorted(bad)
        elif outcome.kind == "refused":  # an error in the configuration, which a row brought to light
            raise UserError(f"{rows.where(items[0].number)}: {outcome.reason}")
        else:
            watched = outcome.kind in ("timeout", "memory", "died")
            yield len(items), None, bad or [(items[0].number, f"preparing it {describe(outcome)}", watched)]


def describe(failure: Failure) -> str:
    """Returns what happened, to follow after what it happened to, such as "took longer than 20 seconds; ..."."""
    before = "failed with " if failure.kind == "error" else ""
    limits = {"timeout": "; see data.row_timeout", "memory": "; see data.row_memory_mb"}
    return f"{before}{failure.reason}{limits.get(failure.kind, '')}."
