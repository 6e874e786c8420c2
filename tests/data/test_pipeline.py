import threading
import time

import numpy as np
import pytest
from synthetic_data import documents_of, make_stream, random_examples

from sft_jax.batch import empty_batch
from sft_jax.data.packing import pipeline
from sft_jax.data.packing.pipeline import batches
from sft_jax.errors import UserError


@pytest.fixture(scope="module")
def stream():
    stream = make_stream(random_examples(60), max_length=64, epochs=2.0)
    assert stream.total_rows % 4 and stream.total_rows > 20
    return stream


def test_a_step_is_its_rows_in_micro_batches(stream):
    position = 3
    for next_row, batch in batches(stream, 3, batch_size=8, micro_batch_size=4):
        assert batch.tokens.shape == (2, 4, 64) and batch.examples.shape == (2, 4, 4)
        expected = stream.read(position, 8)
        for got, want in zip(batch, expected, strict=True):
            assert (got.reshape(want.shape) == want).all()
        assert next_row == min(position + 8, stream.total_rows)
        position = next_row
    assert position == stream.total_rows


def test_a_process_holds_its_part_of_every_micro_batch(stream):
    """Micro-batch a of a step is the same set of rows for every number of processes."""
    whole = list(batches(stream, 0, 8, 4))
    for processes in (2, 4):
        parts = [list(batches(stream, 0, 8, 4, index, processes)) for index in range(processes)]
        for step, (next_row, batch) in enumerate(whole):
            assert {part[step][0] for part in parts} == {next_row}
            for field, want in enumerate(batch):
                assert (np.concatenate([part[step][1][field] for part in parts], axis=1) == want).all()


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_do_not_change_the_order(stream, threads):
    want = [batch.tokens for _, batch in batches(stream, 0, 4, 4, threads=2)]
    got = [batch.tokens for _, batch in batches(stream, 0, 4, 4, threads=threads)]
    assert len(got) == len(want) and all((a == b).all() for a, b in zip(got, want, strict=True))


def test_no_row_is_read_twice_by_one_process(stream):
    class Recording:
        total_rows, seen = stream.total_rows, []

        def read(self, first, count):
            self.seen += range(first, first + count)
            return stream.read(first, count)

    list(batches(Recording(), 0, 8, 4, 1, 2))
    steps = -(-stream.total_rows // 8)
    assert sorted(Recording.seen) == [row for row in range(steps * 8) if row % 4 >= 2]


def test_the_end_of_the_stream(stream):
    assert list(batches(stream, stream.total_rows, 4, 4)) == []
    ((next_row, batch),) = batches(stream, stream.total_rows - 1, 4, 4)
    assert next_row == stream.total_rows
    assert (batch.segments[0, 0] > 0).any() and (batch.segments[0, 1:] == 0).all()


def test_sizes_that_do_not_divide_are_refused(stream):
    with pytest.raises(UserError, match=r"train\.micro_batch_size: 3 does not divide train\.batch_size 8"):
        next(batches(stream, 0, 8, 3))
    with pytest.raises(
        UserError, match=r"train\.micro_batch_size: 4 rows cannot be shared by 3 processes.*multiple of 3"
    ):
        next(batches(stream, 0, 8, 4, 0, 3))


class Failing:
    """A stream whose fifth step cannot be read."""

    total_rows = 40

    def __init__(self, error):
        self.error = error

    def read(self, first, count):
        if first >= 16:
            raise self.error
        return empty_batch(count, 8, 2)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("error", [OSError("disk"), StopIteration(), IndexError("row"), KeyError("x"), GeneratorExit()])
def test_an_exception_in_a_source_reaches_the_caller(error, threads):
    """Whatever is raised, also what iterators take for the end, the loop does not end as if the data had."""
    seen = []
    with pytest.raises(BaseException) as caught:
        for next_row, _ in batches(Failing(error), 0, 4, 4, threads=threads):
            seen.append(next_row)
    assert seen == [4, 8, 12, 16]
    if isinstance(error, (StopIteration, IndexError)):
        assert isinstance(caught.value, RuntimeError) and "rows 16 to 20" in str(caught.value)
    else:
        assert caught.value is error or isinstance(caught.value, RuntimeError)


def test_threads_end_with_the_iterator(stream):
    before = threading.active_count()
    reader = batches(stream, 0, 4, 4, threads=3)
    next(reader)
    reader.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_epoch_at(stream):
    first, second = stream.epoch_rows
    assert stream.epoch_at(0) == 0 and stream.epoch_at(first) == 1 and stream.epoch_at(stream.total_rows) == 2
    assert stream.epoch_at(first + second // 2) == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_counts_of_sets_are_those_of_the_rows_before(block, monkeypatch):
    """Against counting what batches hold, at every position; so a log is exact wherever a run was continued."""
    monkeypatch.setattr(pipeline, "_BLOCK", block)
    sets = random_examples(30, 1), random_examples(20, 2), random_examples(4, 3)
    stream = make_stream(*sets, max_length=48, epochs=2.5, set_epochs=[None, 1.5, 3.0], normalize="examples")
    counts = {f"set_{index}": [0, 0, 0] for index in range(3)}
    for row in range(stream.total_rows + 1):
        assert {name: list(part) for name, part in stream.set_counts(row).items()} == counts
        for number, ids, weights in documents_of(stream.read(row, 1), 0):
            name = stream.identity(number)[0]
            for place, value in enumerate((1, len(ids) - 1, sum(weight > 0 for weight in weights))):
                counts[name][place] += value
    assert stream.set_counts(stream.total_rows + 5) == stream.set_counts(stream.total_rows)  # the padding of the last batch


PLAIN = random_examples(60)


def hash_of(plain=PLAIN, **options):
    return make_stream(plain, **{"max_length": 64, **options}).plan_hash


def test_plan_hash_tells_every_change_that_moves_rows():
    base = hash_of()
    assert base == hash_of()
    changes = {
        "length": hash_of(max_length=65),
        "segments": hash_of(max_segments=3),
        "packing": hash_of(packing=False),
        "seed": hash_of(seed=1),
        "shuffle": hash_of(shuffle=False),
        "normalize": hash_of(normalize="examples"),
        "a token": hash_of([PLAIN[0]._replace(ids=[PLAIN[0].ids[0] ^ 1, *PLAIN[0].ids[1:]]), *PLAIN[1:]]),
        "cut": hash_of(max_length=20, overlength="truncate_left"),
        "cut otherwise": hash_of(max_length=20, overlength="truncate_right"),
        "data": hash_of(PLAIN[1:]),
        "order of the data": hash_of(PLAIN[::-1]),
    }
    assert len({base, *changes.values()}) == len(changes) + 1


def test_plan_hash_tells_the_weights_of_a_mixture():
    sets = PLAIN[:30], PLAIN[30:]
    hashes = {make_stream(*sets, max_length=64, weights=weights).plan_hash for weights in (None, (1, 2), (1, 3))}
    assert len(hashes) == 3
    assert make_stream(*sets, max_length=64, weights=(2, 4)).plan_hash in hashes


def test_documents_come_unpacked_in_the_order_of_the_files():
    plain = random_examples(10, max_tokens=30)
    stream = make_stream(plain, max_length=20, overlength="truncate_right")
    assert stream.document_count == 10
    for index, example in enumerate(plain):
        number, ids, weights = stream.document(index)
        assert (number, ids.tolist(), weights.tolist()) == (index, example.ids[:21], example.weights[:21])


def test_plan_hash_is_that_of_any_length_of_run():
    assert len({hash_of(epochs=0.3), hash_of(epochs=1.0), hash_of(epochs=3.5), hash_of(rows=2), hash_of(rows=500)}) == 1


def test_steps_and_rows_agree():
    stream = make_stream(PLAIN, max_length=64, rows=37)
    assert stream.total_rows == 37
    assert len(list(batches(stream, 0, 4, 2))) == 10
    counted = [document for row in range(37) for document in documents_of(stream.read(row, 1), 0)]
    assert stream.examples == len(counted)
