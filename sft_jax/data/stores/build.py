"""From the rows of one data set to a store: rows go to workers in chunks, what comes back is written in order, by shards."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_jax.data.examples import RowError
from sft_jax.data.sources.registry import Rows
from sft_jax.data.stores import store
from sft_jax.data.stores.circumstances import Circumstances
from sft_jax.data.stores.row_builder import Built, Item
from sft_jax.data.stores.row_counts import RowCounts
from sft_jax.data.stores.store import Encoded, Shard
from sft_jax.data.stores.store_writer import ShardWriter, find_shard, write_manifest
from sft_jax.data.stores.workers import Failure, WorkerPool
from sft_jax.data.tokenizers.vocabulary import Vocabulary
from sft_jax.errors import UserError

CHUNK = 256  # rows that a worker does at a time
LOOK_AHEAD = 10_000  # rows read on after the first bad one, to say how many there are
WATCHDOG_ROWS = 20  # rows that may run into the watchdog before the template or the data as a whole is to blame
SHOWN = 5  # bad rows that a message names
_PROGRESS_SECONDS = 10.0

BadRowEntry = dict[str, Any]  # row, file (index), line, reason; watched: the watchdog ended it, so a limit decided


class Part(NamedTuple):
    """What one of several processes that prepare the same data does: every `count`-th shard, from `index` on."""

    index: int = 0
    count: int = 1
    same_day: bool = True  # whether all of them are known to take the same day for today


@dataclass
class StoreBuilder:
    """Prepares the rows of one data set, shard by shard.

    Args:
        folder: of the stores of these data, whose name is the fingerprint of all that they depend on under any circumstances.
        set_index: of the set in the setup of the pool's workers, see sft_jax.data.stores.row_builder.
        what: names the set in messages, such as "data.train.gsm8k".
        vocabulary: of the model; a row with a token that the model has not stops the build.
        bad_rows: "error" stops at rows that cannot be used, "skip" writes them into the store's list.
        part: the shards that are made here.
    """

    folder: Path
    circumstances: Circumstances
    rows: Rows
    set_index: int
    pool: WorkerPool
    what: str
    vocabulary: Vocabulary
    bad_rows: str
    part: Part
    log: Callable[[str], None]
    _shards: dict[int, Shard] = field(default_factory=dict)
    _counts: RowCounts = field(default_factory=RowCounts)  # of the rows looked at here
    _bad: list[BadRowEntry] = field(default_factory=list)  # of them
    _first_bad: int = 0  # how many rows had been looked at before the first bad ones
    _reported: float = field(default_factory=time.monotonic)

    def build(self, meta: dict[str, Any]) -> bool:
        """Makes the shards of this part, but for those that are there, and the store where all others are there too.

        Returns whether there is a store. `meta` goes into its manifest, with the counts.

        Raises UserError naming file and line of the first bad rows under "error"; under any policy when no row can be
        used, or when many rows run into the watchdog, which costs its whole time for each.
        """
        numbers = range(-(-len(self.rows) // store.SHARD_ROWS))
        for number in numbers:
            self._find(number)
        if self._shards:
            self.log(f"{self.what}: {self._counts.rows:,} of {len(self.rows):,} rows were prepared before; going on from there.")
        for number in numbers:
            if number not in self._shards and number % self.part.count == self.part.index:
                self._make(number)
        if self._bad and self.bad_rows == "error":
            raise bad_rows_error(self.what, self._bad, self.rows, self._counts.rows)
        for number in numbers:  # others may have finished theirs
            self._find(number)
        missing = len(numbers) - len(self._shards)
        if missing:
            self.log(
                f"{self.what}: part {self.part.index} of {self.part.count} is prepared; {missing} of {len(numbers)} shards are still "
                f"missing in {self.folder}. Whichever part ends last completes it."
            )
            return False
        self._finish(meta)
        return True

    def _find(self, number: int) -> None:
        """Takes a shard that a build before this one, or one elsewhere, has finished."""
        if number in self._shards:
            return
        shard = find_shard(self.folder, number, self.circumstances.suffixes(), self._bounds(number), self.log)
        if shard is not None:
            self._shards[number] = shard
            counts = RowCounts.from_dict(shard.record["counted"])
            self._look_at(counts, shard.bad_rows)
            self._check_vocabulary(counts.largest)

    def _make(self, number: int) -> None:
        counts = RowCounts(added_tokens=Counter(dict.fromkeys(self.vocabulary.add_tokens, 0)))
        bad: list[BadRowEntry] = []
        first, stop = self._bounds(number)
        with ShardWriter(self.folder, number, (first, stop), self.vocabulary.tokenizer.vocab_size) as writer:
            for done, built, found in _results(self.rows, first, stop, self.set_index, self.pool):
                entries = [self._entry(*item) for item in found]
                new = RowCounts(rows=done, watched=sum(watched for _, _, watched in found))
                if isinstance(built, Built):
                    places = self.rows.places(built.encoded.rows)
                    new = self._counts_of(built, places, new)
                    self._check_vocabulary(new.largest)
                    self._check_day(new.read_clock)
                    writer.append(built.encoded, places[:, 0], places[:, 1])
                counts.add(new)
                bad += entries
                self._look_at(new, entries)
                self._report()
            suffix = self.circumstances.suffix(counts.read_clock, counts.watched > 0)
            self._shards[number] = writer.finish(counts.to_dict(), bad, suffix)

    def _finish(self, meta: dict[str, Any]) -> None:
        """Writes the manifest. What it says follows from the shards alone, whoever made them and in whatever order."""
        shards = [self._shards[number] for number in sorted(self._shards)]
        counts = RowCounts()
        for shard in shards:
            counts.add(RowCounts.from_dict(shard.record["counted"]))
        if not counts.used_rows:
            bad = [row for shard in shards for row in shard.bad_rows]
            raise UserError(f"{self.what}: none of its {len(self.rows):,} rows can be used:{_list_of(bad, self.rows)}")
        suffix = self.circumstances.suffix(counts.read_clock, counts.watched > 0)
        write_manifest(self.folder, suffix, shards, self.rows.names, {**meta, **counts.summary()})

    def _look_at(self, counts: RowCounts, bad: list[BadRowEntry]) -> None:
        """Counts rows, and raises UserError where those that cannot be used are reason enough to stop."""
        if not self._bad:
            self._first_bad = self._counts.rows
        self._bad += bad
        self._counts.add(counts)
        done, watched = self._counts.rows, self._counts.watched
        if self._bad and self.bad_rows == "error" and (watched or done - self._first_bad > LOOK_AHEAD):
            raise bad_rows_error(self.what, self._bad, self.rows, self._counts.rows)
        if watched >= WATCHDOG_ROWS:
            raise UserError(
                f"{self.what}: {watched} of the {done:,} rows read so far ran into the limits of data.row_timeout or "
                f"data.row_memory_mb:{_list_of(self._bad, self.rows)}\nCheck the chat template, or raise the limits."
            )

    def _counts_of(self, built: Built, places: np.ndarray, counts: RowCounts) -> RowCounts:
        """Returns `counts` with those of what a worker has built."""
        part = built.encoded
        added = {text: self.vocabulary.tokenizer.added_tokens[text] for text in self.vocabulary.add_tokens}
        counts.used_rows = sum(built.kinds.values())
        counts.kinds, counts.counts, counts.unused_fields = built.kinds, built.counts, built.unused_fields
        counts.added_tokens.update({text: int(np.sum(part.ids == token)) for text, token in added.items()})
        counts.read_clock = built.read_clock
        counts.largest = _largest(part, places) if len(part.ids) else counts.largest
        return counts

    def _check_vocabulary(self, largest: dict[str, int]) -> None:
        self.vocabulary.check(largest["id"], self.rows.names[largest["file"]], largest["line"])

    def _check_day(self, read_clock: bool) -> None:
        """Raises UserError for rows that depend on the day where other processes may begin on another one."""
        if read_clock and not self.part.same_day:
            raise UserError(
                f"data.date: the chat template writes the date into rows of {self.what}, and processes that do not begin on the "
                f"same day would prepare different ones; set data.date, such as {self.circumstances.rendered_at}, in all of them."
            )

    def _bounds(self, number: int) -> tuple[int, int]:
        return number * store.SHARD_ROWS, min((number + 1) * store.SHARD_ROWS, len(self.rows))

    def _entry(self, number: int, reason: str, watched: bool) -> BadRowEntry:
        ((file, line),) = self.rows.places(np.array([number])).tolist()
        return {"row": number, "file": file, "line": line, "reason": reason, **({"watched": True} if watched else {})}

    def _report(self) -> None:
        if time.monotonic() - self._reported > _PROGRESS_SECONDS:
            self._reported = time.monotonic()
            self.log(f"{self.what}: {self._counts.rows:,} of {len(self.rows):,} rows prepared.")


def _largest(part: Encoded, places: np.ndarray) -> dict[str, int]:
    """Returns the largest token id and the file and line of the first row that has it."""
    token = int(part.ids.argmax())
    file, line = places[np.searchsorted(np.cumsum(part.lengths), token, side="right")].tolist()
    return {"id": int(part.ids[token]), "file": file, "line": line}


def bad_rows_error(what: str, bad: list[BadRowEntry], rows: Rows, done: int) -> UserError:
    """Returns the error for rows that cannot be used. `done` is how many rows have been looked at."""
    of = f"{done:,} rows" if done == len(rows) else f"the {done:,} rows read so far"
    return UserError(
        f"{what}: {len(bad):,} of {of} cannot be used:{_list_of(bad, rows)}\n"
        "Correct or remove them, or leave them out, counted, with data.bad_rows=skip."
    )


def _list_of(bad: list[BadRowEntry], rows: Rows) -> str:
    first = sorted(bad, key=lambda entry: entry["row"])[:SHOWN]
    lines = [f"\n  {rows.names[entry['file']]}:{entry['line']}: {entry['reason']}" for entry in first]
    return "".join(lines) + (f"\n  and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else "")


def _results(
    rows: Rows, first: int, stop: int, set_index: int, pool: WorkerPool
) -> Iterator[tuple[int, Built | None, list[tuple[int, str, bool]]]]:
    """Yields (rows done, examples or None, bad rows as (number, reason, whether the watchdog ended it)) of rows in order."""
    unreadable: dict[int, str] = {}

    def chunks() -> Iterator[list[Item]]:
        size = max(1, min(CHUNK, -(-(stop - first) // (4 * pool.count))))
        for start in range(first, stop, size):
            items = []
            for number, row in enumerate(rows.unparsed(start, min(start + size, stop)), start):
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
