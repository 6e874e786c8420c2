"""A pool of worker processes with a watchdog, for work on rows that nobody vouches for.

Work comes in chunks of items. A chunk that takes longer than `timeout`, runs out of memory, kills its worker or raises
is done again item by item, so that the item at fault is known and the others are not lost. Processes are started as
`python -c`, not by multiprocessing: they do not import the user's main module, and need no `if __name__` guard there.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sft_jax.data.stores.worker import MEMORY_EXIT

START_SECONDS = 300.0  # that a worker may take to import and set up


class Failure(NamedTuple):
    """An item that could not be done although it had a worker to itself."""

    kind: Literal["timeout", "memory", "died", "refused", "error"]  # refused: by a UserError, whose message is here
    reason: str


@dataclass
class _Task:
    number: int  # of the chunk
    start: int  # place of the first item in the chunk
    items: list[Any]
    sent: int = 0  # times that it was given to a worker


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: multiprocessing.connection.Connection
    log: Any  # its standard output and error
    deadline: float
    ready: bool = False
    task: _Task | None = None


@dataclass
class _Chunk:
    """What is known of one chunk: the result of the whole, or those of its items one by one."""

    results: dict[int, tuple[_Task, Any]] = field(default_factory=dict)  # by the start of the task
    missing: int = 1
    next: int = 0  # start of the task whose result is to be handed out next


class WorkerPool:
    """Worker processes that all run `target` ("module:callable", see sft_jax.data.stores.worker). Use as a context manager.

    Args:
        setup: picklable argument of the callable; an attribute, which workers that start later take as it is then.
        count: processes.
        timeout: seconds that one item may take alone; and a chunk, before it is done item by item.
        memory_mb: memory that a worker may take beyond what it starts with.
    """

    def __init__(self, target: str, setup: Any, count: int, timeout: float, memory_mb: int):
        self._target, self.setup, self.count = target, setup, count
        self._timeout, self._memory_mb = timeout, memory_mb
        self._workers: list[_Worker] = []

    def __enter__(self) -> "WorkerPool":
        try:
            for _ in range(self.count):  # all at once: starting takes longer than most chunks
                self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills all workers."""
        for worker in list(self._workers):
            self._discard(worker)

    def run(self, chunks: Iterable[list[Any]]) -> Iterator[tuple[list[Any], Any]]:
        """Yields (items, result) in the order of the chunks; or, where a chunk had to be taken apart, for each item

        ([item], result or Failure). `result` is what the callable's function returns for the list of items. Chunks are
        drawn as workers become free, and not far ahead of the results, so little is held in memory.
        """
        source = enumerate(iter(chunks))
        queue: deque[_Task] = deque()
        order: dict[int, _Chunk] = {}
        first, exhausted = 0, False
        try:
            while True:
                while not exhausted and len(queue) < self.count and len(order) < 4 * self.count:
                    number, items = next(source, (0, None))
                    if items is None:
                        exhausted = True
                    else:
                        queue.append(_Task(number, 0, items))
                        order[number] = _Chunk()
                while first in order:
                    chunk = order[first]
                    while chunk.next in chunk.results:
                        task, outcome = chunk.results.pop(chunk.next)
                        chunk.next += len(task.items)
                        yield task.items, outcome
                    if chunk.missing:
                        break
                    del order[first]
                    first += 1
                if not order:
                    if exhausted:
                        return
                    continue
                self._feed(queue)
                for worker, outcome in self._wait():
                    self._settle(worker.task, outcome, queue, order)
                    worker.task = None
                    if isinstance(outcome, Failure) and outcome.kind not in ("refused", "error"):
                        self._discard(worker)
        finally:
            for worker in list(self._workers):
                if worker.task is not None:  # whoever reads the results has stopped
                    self._discard(worker)

    @staticmethod
    def _settle(task: _Task, outcome: Any, queue: deque[_Task], order: dict[int, _Chunk]) -> None:
        """Files the outcome of a task; a chunk that failed goes back to the queue as single items."""
        chunk = order[task.number]
        if isinstance(outcome, Failure) and len(task.items) > 1:
            # In front of what waits: results are wanted in order.
            queue.extendleft(_Task(task.number, at, [item]) for at, item in reversed(list(enumerate(task.items))))
            chunk.missing = len(task.items)
        else:
            chunk.results[task.start] = task, outcome
            chunk.missing -= 1

    def _feed(self, queue: deque[_Task]) -> None:
        """Gives waiting tasks to idle workers, and starts workers while there are more tasks than that."""
        for worker in list(self._workers):
            if queue and worker.ready and worker.task is None:
                task = queue.popleft()
                task.sent += 1
                try:
                    worker.connection.send(task.items)
                except (BrokenPipeError, ConnectionResetError):
                    if task.sent == 1:  # it most likely died while idle, which is not the task's fault
                        queue.appendleft(task)
                        self._discard(worker)
                        continue
                    # A second time, it is the task that cannot be received; waiting for the answer finds how it ended.
                worker.task, worker.deadline = task, time.monotonic() + self._timeout
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self.count and starting < len(queue):
            self._start()
            starting += 1

    def _wait(self) -> list[tuple[_Worker, Any]]:
        """Waits for something to happen. Returns the workers whose task is done, with its result or a Failure."""
        waiting = {worker.connection: worker for worker in self._workers if worker.task or not worker.ready}
        soonest = min(worker.deadline for worker in waiting.values())
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, soonest - time.monotonic()))
        done = []
        for connection in ready:
            worker = waiting[connection]
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):  # it may have died in the middle of an answer
                kind, value = "died", None
            if not worker.ready:
                if kind != "ready":
                    raise RuntimeError(f"a worker process did not start: {value or self._end_of(worker)}")
                worker.ready = True
            else:
                done.append((worker, value if kind == "result" else self._failure(worker, kind, value)))
        now = time.monotonic()
        for connection, worker in waiting.items():
            if connection in ready or worker.deadline > now:
                continue
            if not worker.ready:
                raise RuntimeError(f"a worker process did not start within {START_SECONDS:.0f} seconds")
            done.append((worker, Failure("timeout", f"took longer than {self._timeout:g} seconds")))
        return done

    def _failure(self, worker: _Worker, kind: str, value: str | None) -> Failure:
        if kind == "died":
            ending = self._end_of(worker)
            if worker.process.returncode != MEMORY_EXIT and "memory allocation" not in ending:
                return Failure("died", f"ended the worker process ({ending})")
            kind = "memory"
        if kind == "memory":
            return Failure("memory", f"needed more than {self._memory_mb} MB of memory")
        return Failure(kind, value)

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        log = tempfile.TemporaryFile()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # there is a worker for every core already
            "OPENBLAS_NUM_THREADS": "1",
        }
        code = f"from sft_jax.data.stores.worker import main; main({theirs.fileno()}, {os.getpid()})"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], pass_fds=[theirs.fileno()], env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        theirs.close()
        worker = _Worker(process, ours, log, time.monotonic() + START_SECONDS)
        self._workers.append(worker)
        try:
            ours.send((self._target, self.setup, self._memory_mb))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(f"a worker process did not start: {self._end_of(worker)}") from error

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.wait()
        worker.connection.close()
        worker.log.close()

    @staticmethod
    def _end_of(worker: _Worker) -> str:
        """Returns how a worker that has died ended, with the last line that it wrote."""
        worker.process.wait()
        status = worker.process.returncode
        worker.log.seek(0)
        lines = worker.log.read().decode(errors="replace").strip().splitlines()
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"{name}: {lines[-1][:300]}" if lines else name
