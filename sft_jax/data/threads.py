"""A pool of threads that does what sft_jax.data.workers does in processes, for work that needs no watchdog.

Rows without a chat template run none of the user's code, and a tokenizer that lets go of the interpreter while it
encodes keeps all cores busy from threads. Starting a process costs as much as some thousand such rows.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sft_jax.data.worker import one_line
from sft_jax.data.workers import Failure
from sft_jax.errors import UserError


class ThreadPool:
    """`count` threads that call `function` with lists of items. Use as a context manager."""

    of = "thread(s)"

    def __init__(self, function: Callable[[list[Any]], Any], count: int):
        self._function, self.count = function, count
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="prepare")

    def __enter__(self) -> "ThreadPool":
        gc.freeze()  # each look at all that the process holds would stop every thread
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        self._executor.shutdown(cancel_futures=True)

    def run(self, chunks: Iterable[list[Any]]) -> Iterator[tuple[list[Any], Any]]:
        """Yields (items, result) in the order of the chunks; or, where a chunk failed, for each of its items

        ([item], result or Failure). Chunks are drawn not far ahead of the results, so little is held in memory.
        """
        waiting: deque[tuple[list[Any], Future]] = deque()
        for items in chunks:
            waiting.append((items, self._executor.submit(self._function, items)))
            if len(waiting) > 2 * self.count:
                yield from self._settle(*waiting.popleft())
        while waiting:
            yield from self._settle(*waiting.popleft())

    def _settle(self, items: list[Any], future: Future) -> Iterator[tuple[list[Any], Any]]:
        if future.exception() is None:
            yield items, future.result()
        elif len(items) == 1:
            yield items, _failure(future.exception())
        else:  # the item at fault is found, and the others are not lost
            for item in items:
                yield from self._settle([item], self._executor.submit(self._function, [item]))


def _failure(error: BaseException) -> Failure:
    if isinstance(error, UserError):
        return Failure("refused", str(error))
    if isinstance(error, MemoryError):
        return Failure("memory", "needed more memory than there is")
    if isinstance(error, Exception):  # whatever a row can cause; the caller names the row
        return Failure("error", one_line(error))
    raise error
