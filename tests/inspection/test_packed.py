"""Packed rows: put together again they are the batches of training; filters find the rows in which a document lies."""

import numpy as np
import pytest
from inspected_rows import PLAIN, ROWS, write

from sft_jax.errors import UserError
from sft_jax.inspection.filters import Filters
from sft_jax.inspection.packed import PackedSelection, read_row
from sft_jax.inspection.statistics import row_fill, shares


@pytest.fixture(scope="module")
def subject(inspected, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    train = {"chats": write(folder / "chats.jsonl", ROWS), "pairs": {"path": write(folder / "pairs.jsonl", PLAIN)}}
    return inspected(train, eval=write(folder / "held_out.jsonl", PLAIN[:3]), settings={"train": {"epochs": 2.0}})


def test_segments_put_together_are_the_row(subject):
    stream = subject.data.train
    for number in range(stream.total_rows):
        batch, row = stream.read(number, 1), read_row(stream, "train", number)
        for index, segment in enumerate(row.segments, start=1):
            at = slice(segment.start, segment.start + len(segment.tokens))
            assert (batch.segments[0, at] == index).all()
            assert (batch.tokens[0, at] == segment.ids[:-1]).all() and (batch.targets[0, at] == segment.ids[1:]).all()
            assert (batch.weights[0, at] == segment.id_weights[1:]).all() and segment.id_weights[0] == 0
            assert stream.identity(batch.examples[0, index - 1]) == (segment.set, segment.file, segment.line, segment.turn)
        assert row.used == (batch.segments > 0).sum() and row.supervised == (batch.weights > 0).sum()
        assert (row.number, row.of, row.length) == (number + 1, stream.total_rows, stream.max_length)


def test_every_row_is_shown_training_first(subject):
    selection = PackedSelection(subject, Filters())
    names = [(row.stream, row.number) for row in selection.take()]
    train, held_out = subject.data.train.total_rows, subject.data.eval["eval"].total_rows
    assert names == [*(("train", n + 1) for n in range(train)), *(("eval", n + 1) for n in range(held_out))]
    assert selection.matched == selection.of == train + held_out


def test_rows_of_a_set_and_of_a_row_of_the_data(subject):
    everything = list(PackedSelection(subject, Filters()).take())

    def numbers(fits):
        return [(row.stream, row.number) for row in everything if any(fits(s) for s in row.segments)]

    def found(**filters):
        return [(row.stream, row.number) for row in PackedSelection(subject, Filters(**filters)).take()]

    assert found(set="chats") == numbers(lambda s: s.set == "chats")
    assert found(row="chats.jsonl:4") == numbers(lambda s: s.file.endswith("/chats.jsonl") and s.line == 4) != []
    assert found(set="eval", row="1") == [("eval", 1)]
    assert found(row="1") == [("train", 1), ("eval", 1)]


def test_a_limit_is_of_what_is_read_and_not_of_what_is_counted(subject):
    whole, part = (PackedSelection(subject, Filters(set="chats")) for _ in range(2))
    rows = list(whole.take())
    assert [row.number for row in part.take(1)] == [rows[0].number]
    assert (part.matched, part.of) == (whole.matched, whole.of) and whole.matched == len(rows)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"search": "a"}, "--search: chooses examples, not packed rows; leave out --search or --rows."),
        ({"longest": 3}, "--longest: chooses examples, not packed rows; leave out --longest or --rows."),
        ({"set": "eval", "row": "99"}, "--row: there is no packed row 99; they are numbered from 1 to {eval}."),
    ],
)
def test_filters_of_examples_are_refused(subject, filters, message):
    with pytest.raises(UserError) as error:
        PackedSelection(subject, Filters(**filters))
    assert str(error.value) == message.format(eval=subject.data.eval["eval"].total_rows)


def test_statistics_of_rows_are_those_of_the_batches(subject):
    stream = subject.data.train
    batch = stream.read(0, stream.total_rows)
    assert row_fill(stream).tolist() == (batch.segments > 0).sum(axis=1).tolist()
    totals = {name: np.zeros(3, int) for name in ("chats", "pairs")}
    for number in range(stream.total_rows):
        for segment in read_row(stream, "train", number).segments:
            totals[segment.set] += [1, len(segment.tokens), (segment.weights > 0).sum()]
    assert np.array_equal(np.stack([totals["chats"], totals["pairs"]]), np.stack(shares(subject), axis=1))
