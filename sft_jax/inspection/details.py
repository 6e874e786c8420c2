"""Examples with their texts: rows go once more through the code that prepared them, and must give what the store holds."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sft_jax.data.examples import BadRow, BuiltRow, Example, RowError
from sft_jax.data.sources.registry import Rows
from sft_jax.data.stores import row_builder
from sft_jax.data.stores.build import CHUNK, describe
from sft_jax.data.stores.maker import cores
from sft_jax.data.stores.row_builder import Item
from sft_jax.data.stores.workers import Failure, WorkerPool
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.inspection.subject import InspectedSet, Subject

_NOTHING = np.zeros(0, np.int32), np.zeros(0, np.float32)


class Detail(NamedTuple):
    """One example, or one row that cannot be used."""

    split: str  # "train" or "eval"
    set: str
    file: str
    line: int
    row: int  # number of the row in its data set, from 1 on
    turn: int  # -1, or the assistant turn that the example was made for
    text: str  # what was tokenised, or the tokens decoded where the data bring tokens; "" of a row that cannot be used
    ids: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n], of ids as targets; the first is 0
    kind: str  # how the row became examples, see sft_jax.data.examples.BuiltRow; "" of a row that cannot be used
    problem: str  # why the row cannot be used, or what the over-length policy does to the example; "" = nothing
    trained: int  # targets with a weight above 0 that the over-length policy leaves
    shortened: bool  # it does not fit a row
    note: str = ""  # why an example without a problem is not in the run, "" = it is

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


Wanted = Sequence[tuple[InspectedSet, np.ndarray]]  # sets, and the numbers of the rows wanted of each, from 0 on, ascending


def read_details(subject: Subject, wanted: Wanted) -> Iterator[Detail]:
    """Yields the examples of the wanted rows in the order of the data; a row can have several, one that cannot be used one.

    Little is held in memory. Raises UserError where a row does not give the ids and weights of the store.
    """
    config = subject.config
    count = sum(-(-len(numbers) // CHUNK) for _, numbers in wanted)
    if not count:
        return
    processes = min(config.workers or cores(), count)
    with WorkerPool(row_builder.DETAILS_TARGET, subject.setup, processes, config.row_timeout, config.row_memory_mb) as pool:
        for item, numbers in wanted:
            for number, result in _results(item, numbers, pool):
                yield from _details(item, number, result, subject.data.tokenizer)


def _results(item: InspectedSet, numbers: np.ndarray, pool: WorkerPool) -> Iterator[tuple[int, BuiltRow | BadRow]]:
    """Yields (row number, what it becomes) in order."""
    # A row that the watchdog ended costs its whole time, and the store says what became of it.
    known = {entry["row"]: BadRow(entry["reason"]) for entry in item.store.bad_rows if entry.get("watched")}

    def chunks() -> Iterator[list[Item]]:
        for first in range(0, len(numbers), CHUNK):
            items = []
            for number, row in _read(item.rows, numbers[first : first + CHUNK]):
                if isinstance(row, RowError):
                    known[number], row = BadRow(str(row)), None
                items.append(Item(item.number, number, None if number in known else row))
            yield items

    for items, outcome in pool.run(chunks()):
        if isinstance(outcome, Failure):
            if outcome.kind == "refused":
                raise UserError(f"{item.rows.where(items[0].number)}: {outcome.reason}")
            found = {items[0].number: BadRow(f"preparing it {describe(outcome)}")}
        else:
            found = dict(outcome)
        for entry in items:
            yield entry.number, known.pop(entry.number) if entry.row is None else found[entry.number]


def _read(rows: Rows, numbers: np.ndarray) -> Iterator[tuple[int, dict | RowError]]:
    """Yields (number, row); neighbours are read together."""
    for part in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        yield from zip(part.tolist(), rows.read(int(part[0]), int(part[-1]) + 1), strict=True)


def _details(item: InspectedSet, number: int, result: BuiltRow | BadRow, tokenizer: Tokenizer) -> Iterator[Detail]:
    where = item.rows.where(number)
    stored = item.examples_of(number)
    examples: Sequence[Example] = () if isinstance(result, BadRow) else result.examples
    if len(examples) != len(stored):
        raise _differs(item, number, f"{len(stored)} example(s), now {len(examples)}", result)
    if isinstance(result, BadRow):
        yield Detail(item.split, item.name, where.file, where.line, number + 1, -1, "", *_NOTHING, "", result.reason, 0, False)
        return
    corpus = item.stream.corpus
    for example, place in zip(examples, stored, strict=True):
        span = corpus.offsets[place : place + 2]
        local = place - item.first
        same = np.array_equal(corpus.read_ids(span[:1], span[1:]), example.ids)
        if not same or not np.array_equal(corpus.read_weights(span[:1], span[1:]), example.weights):
            raise _differs(item, number, "other weights" if same else "other tokens", result)
        text = example.text or tokenizer.decode(example.ids.tolist())
        yield Detail(
            item.split, item.name, where.file, where.line, number + 1, example.turn, text, example.ids, example.weights,
            result.kind, item.shortened.problem(local), item.shortened.trained(local), item.shortened.cut(local),
            item.shortened.note(local),
        )  # fmt: skip


def _differs(item: InspectedSet, number: int, what: str, result: BuiltRow | BadRow) -> UserError:
    reason = f" ({result.reason})" if isinstance(result, BadRow) else ""
    return UserError(
        f"{item.rows.where(number)}: the prepared data hold {what}{reason}. A chat template that does not always write "
        "the same does that, and a row at the limits of data.row_timeout or data.row_memory_mb; to prepare again remove "
        f"{item.store.folder}."
    )
