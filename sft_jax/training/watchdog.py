"""Says where a run stands that does not go on: the stacks of all threads, when a step takes far longer than steps do.

A run that hangs (in a collective that a peer does not reach, in a file system, in a lock) shows nothing by itself. The watchdog
ends nothing, since slow is not dead: processes that are dead are the business of `peers`.
"""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time

from sft_jax.errors import UserError
from sft_jax.training.workdir import Workdir

_FACTOR = 10.0  # times the median step
_LEAST = 120.0  # seconds that a step may always take
_LONGER = 1800.0  # seconds for the first step, which compiles, and for evaluation and saving
_MOST_DUMPS = 3
_REMEMBERED = 101  # steps of which the median is


class Watchdog:
    """Watches the loop while it is entered.

    Attributes:
        dumps: how often stacks were written; three times at most, each wait twice the one before.
    """

    def __init__(self, work: Workdir, name: str, seconds: float | None):
        """Stacks go to standard error and to the file `name` of the folder of the run, which is shared at once: the run may save no more.

        Args:
            seconds: that a step may take; None: ten times the median of the steps so far, at least 120 s; 0: nothing is watched.
        """
        self.dumps = 0
        self._work, self._name, self._seconds = work, name, seconds
        self._steps: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._since, self._longer, self._first = time.monotonic(), False, True
        self._wait = 1.0  # how many limits until the next dump
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        if self._seconds != 0:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def step_ended(self) -> None:
        """Notes that the loop goes on."""
        now = time.monotonic()
        if not self._first:
            self._steps.append(now - self._since)
        self._first, self._since, self._wait = False, now, 1.0

    @contextlib.contextmanager
    def longer(self):
        """For what happens between steps and may take longer than they do."""
        self._longer, self._since = True, time.monotonic()
        try:
            yield
        finally:
            self._longer, self._since, self._wait = False, time.monotonic(), 1.0

    @property
    def limit(self) -> float:
        """Seconds that what happens now may take."""
        own = self._seconds
        if own is None:
            own = max(_LEAST, _FACTOR * statistics.median(self._steps)) if self._steps else _LEAST
        return max(own, _LONGER) if self._first or self._longer else own

    def _watch(self) -> None:
        while not self._over.wait(min((self._seconds or _LEAST) / 10, 1.0)):
            taken = time.monotonic() - self._since
            if taken > self.limit * self._wait and self.dumps < _MOST_DUMPS:
                self._dump(taken)
                self._wait *= 2

    def _dump(self, taken: float) -> None:
        self.dumps += 1
        count = f"{self.dumps} of at most {_MOST_DUMPS}"
        said = f"The step has not ended for {taken:.0f} s (train.hang_seconds); the stacks of all threads, {count}:"
        print(f"{said} also in {self._work.shown}/{self._name}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2, all_threads=True)
        path = self._work.path / self._name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {said}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        try:
            self._work.share(self._name)
        except UserError as error:  # what hangs may be the network
            print(f"The stacks are on the disk of this machine only: {error}", file=sys.stderr, flush=True)
