"""The watchdog: whatever one item does, it is named, and every other item is done."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_jax.data.stores.workers import Failure, WorkerPool

TIMEOUT = 1.5


def pool_of(count=2, target="worker_targets:make", timeout=TIMEOUT, memory_mb=96, setup=2):
    return WorkerPool(target, setup, count, timeout, memory_mb)


def outcomes(results):
    """(items, results) of chunks -> item results in order, whichever way the chunks were taken apart."""
    flat = []
    for items, outcome in results:
        if isinstance(outcome, Failure):
            assert len(items) == 1
            flat.append(outcome)
        else:
            assert len(outcome) == len(items)
            flat += outcome
    return flat


@pytest.fixture(scope="module")
def pool():
    with pool_of() as pool:
        yield pool


def test_results_come_in_order(pool):
    chunks = [list(range(10 * i, 10 * i + 1 + i % 4)) for i in range(30)]
    got = list(pool.run(iter(chunks)))
    assert [items for items, _ in got] == chunks
    assert outcomes(got) == [2 * item for chunk in chunks for item in chunk]
    assert list(pool.run([])) == []


@pytest.mark.parametrize("count", range(1, 20))
def test_any_number_of_chunks(pool, count):
    assert outcomes(pool.run([[item] for item in range(count)])) == [2 * item for item in range(count)]


@pytest.mark.parametrize(
    ("misdeed", "kind", "reason"),
    [
        ("loop", "timeout", "took longer than 1.5 seconds"),
        ("sleep", "timeout", "took longer than 1.5 seconds"),
        ("eat", "memory", "needed more than 96 MB of memory"),
        ("eat slowly", "memory", "needed more than 96 MB of memory"),
        ("a long answer", "memory", "needed more than 96 MB of memory"),
        ("die", "died", "ended the worker process (SIGKILL)"),
        ("die while answering", "died", "ended the worker process (SIGKILL)"),
        ("exit", "died", "ended the worker process (exit status 3: last words)"),
        ("raise", "error", "KeyError: 'no such thing' (worker_targets.py:"),
        ("refuse", "refused", "this will not do"),
    ],
)
def test_the_item_at_fault_is_named_and_the_others_are_done(pool, misdeed, kind, reason):
    got = outcomes(pool.run([[1, 2], [3, misdeed, 4], [5], [6, 7]]))
    failure = got.pop(3)
    assert got == [2, 4, 6, 8, 10, 12, 14]
    assert isinstance(failure, Failure) and failure.kind == kind and failure.reason.startswith(reason)


@pytest.mark.parametrize("megabytes", [60, 200])
def test_an_item_too_large_to_be_received(pool, megabytes):
    """60 MB are read and too many once they are unpickled; the end comes before all of 200 MB are written."""
    got = outcomes(pool.run([[1, b"x" * (megabytes << 20), 2], [3]]))
    failure = got.pop(1)
    assert got == [2, 4, 6] and failure == Failure("memory", "needed more than 96 MB of memory")


def test_many_at_once(pool):
    chunks = [["die", 1], ["raise", "raise"], [2, "exit"], ["refuse"], [3]]
    got = outcomes(pool.run(chunks))
    assert [item.kind if isinstance(item, Failure) else item for item in got] == [
        "died", 2, "error", "error", 4, "died", "refused", 6,
    ]  # fmt: skip


def test_results_of_a_chunk_that_was_taken_apart_come_as_they_are_done():
    """The first failure is known before the rest of the chunk is done, so whoever stops at it need not wait."""
    with pool_of(count=1, timeout=0.5) as pool:
        results = pool.run([[1, *["sleep"] * 40]])  # 20 seconds
        began = time.monotonic()
        assert next(results) == ([1], [2])
        items, outcome = next(results)
        assert items == ["sleep"] and outcome.kind == "timeout"
        assert time.monotonic() - began < 0.5 * 30
        results.close()
        assert outcomes(pool.run([[4]])) == [8]  # nothing of what was given up remains


def test_chunks_are_not_drawn_far_ahead(pool):
    drawn = []

    def chunks():
        for number in range(1000):
            drawn.append(number)
            yield [number]

    results = pool.run(chunks())
    next(results)
    assert len(drawn) < 30
    results.close()


def test_an_idle_worker_that_dies_is_replaced(pool):
    (pid,) = outcomes(pool.run([["pid"]]))
    os.kill(pid, 9)
    time.sleep(0.1)
    assert outcomes(pool.run([[1], [2], [3], [4]])) == [2, 4, 6, 8]


def test_output_of_workers_does_not_reach_the_terminal(pool, capfd):
    assert outcomes(pool.run([["print"]])) == ["printed"]
    assert capfd.readouterr() == ("", "")


def test_workers_import_nothing_heavy():
    with pool_of(count=1) as pool:
        (modules,) = outcomes(pool.run([["modules"]]))
    assert not {"jax", "transformers", "grain", "tensorflow", "torch", "hypothesis"} & set(modules)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("worker_targets:fail", "ValueError: cannot set up 2"),
        ("worker_targets:die", "exit status 127: a linker error, say"),
    ],
)
def test_a_worker_that_cannot_start_ends_the_run(target, message):
    with pytest.raises(RuntimeError, match="did not start") as caught, pool_of(target=target) as pool:
        list(pool.run([[1], [2]]))
    assert message in str(caught.value)


def test_closing_ends_all_workers():
    with pool_of() as pool:
        pids = {item for item in outcomes(pool.run([["pid"]] * 20))}
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_do_not_outlive_a_parent_that_is_killed():
    """Also not one that is in an endless loop."""
    code = """
import os, sys
from sft_jax.data.stores.workers import WorkerPool
pool = WorkerPool("worker_targets:make", 2, 1, 60, 512)
for items, result in pool.run([["pid"], ["loop"]]):
    print(result[0], flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(parent.stdout.readline())
    time.sleep(0.3)  # into the loop
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
