"""What one process learns and all must act on at the same step: a request to stop, or an error that only one met.

A process that stopped or raised by itself would leave the others waiting for ever in the next step. So the vote of every
process rides in the steps that all of them run anyway, and comes back with the metrics, two steps late: no message of its
own, no wait for the host. A run of one process acts at once.
"""

import collections
import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.checkpoint.processes import agree, anywhere
from sft_jax.training.signals import StopSignal

_STOP, _FAILED = 1, 2


class Votes:
    """The votes of all processes of a run. All of them make the same calls at the same steps."""

    def __init__(self, stop: StopSignal, mesh: Mesh):
        self._stop, self._mesh = stop, mesh
        self._several = jax.process_count() > 1
        self._failure: Exception | None = None
        self._cast: collections.deque[jax.Array] = collections.deque()
        self._outcome = 0  # the highest vote among those counted

    def ride(self, program: Callable[..., Any], donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """Returns `program`, a jitted function that every process calls, so that it takes the votes along.

        `donate` are the arguments that it overwrites.
        """
        if not self._several:
            return program
        whole = NamedSharding(self._mesh, P())

        def voting(votes: jax.Array, *args):
            return program(*args), jax.lax.with_sharding_constraint(jnp.max(votes), whole)

        compiled = jax.jit(voting, donate_argnums=tuple(number + 1 for number in donate))

        def call(*args):
            result, vote = compiled(self._own(), *args)
            self._cast.append(vote)
            return result

        return call

    def _own(self) -> jax.Array:
        """Returns this process's vote on each of its devices."""
        vote = _FAILED if self._failure is not None else _STOP if self._stop.name else 0
        split = NamedSharding(self._mesh, P(self._mesh.axis_names))
        return jax.make_array_from_callback((self._mesh.size,), split, lambda index: np.full(1, vote, np.int32))

    def count(self, late: int) -> None:
        """Counts the votes of all calls but the `late` newest, which may not have ended yet."""
        while len(self._cast) > late:
            vote = self._cast.popleft().block_until_ready()  # on every device: only then may another program follow
            self._outcome = max(self._outcome, int(jax.device_get(vote)))

    def stopping(self, late: int) -> bool:
        """Counts as `count` does, and returns whether all know that the run is to end."""
        self.count(late)
        return self.failed or self.stop is not None

    @property
    def stop(self) -> str | None:
        """The signal that all know of, or None."""
        if not self._several:
            return self._stop.name
        return (self._stop.name or "a signal to another process") if self._outcome == _STOP else None

    @property
    def failed(self) -> bool:
        """Whether all know that a process has failed; `raise_failure` says more."""
        return self._outcome == _FAILED

    @contextlib.contextmanager
    def deferred(self):
        """For what only one process does, or may fail in one only: an error is raised once all know of it."""
        try:
            yield
        except Exception as error:
            if not self._several:
                raise
            self._failure = self._failure or error

    def raise_failure(self) -> None:
        """Raises this process's error, or one that says that another has failed; call it where all processes do."""
        agree(self._raise_own)

    def _raise_own(self) -> None:
        if self._failure is not None:
            raise self._failure

    def check(self) -> None:
        """Ends the run in all processes where one was asked to stop; call it between phases, when nothing is to be saved."""
        if self.asked():
            self._stop.raise_stopped()

    def asked(self) -> bool:
        """Returns whether any process was asked to stop; all processes must call this, with no program under way."""
        return anywhere(self._stop.name is not None)
