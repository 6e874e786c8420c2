"""The loop: batches through the step, and what happens between steps. It composes and computes nothing.

Metrics are fetched two steps late, so the host never waits for the step it has just started.
"""

import collections
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from sft_jax.batch import Batch
from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.training.metrics import TRAIN, MetricsLog
from sft_jax.training.profiler import Profiler
from sft_jax.training.progress import Progress
from sft_jax.training.signals import STOP_AFTER_STEPS
from sft_jax.training.votes import Votes
from sft_jax.training.watchdog import Watchdog
from sft_jax.training.window import Window

_LATE = 2  # steps


@dataclass
class Hooks:
    """What the run does between steps. All processes call all of them at the same steps."""

    evaluate: Callable[[Any, int], None]  # (state, step)
    save: Callable[[Any, int, int, Window], None]  # (state, step, position, window)
    check: Callable[[], None]  # raises what a save in the background met
    resume_point: Callable[[], str]  # says which step the next start continues from
    describe: Callable[[Batch], str]  # names the examples of a batch, for the message about a step that went wrong
    attention_pairs: Callable[[Batch], int]  # of a batch, over all processes, as this one's part tells
    keep_examples: Callable[[int, int, dict[str, Any]], None]  # (step, position after it, metrics), of every step in order
    begin_update: Callable[[Any], Callable[[Any], jax.Array]]  # (state before a step) -> (state after it) -> its update ratio
    used: Callable[[int], dict[str, float]]  # what so many rows of the stream are: epochs, and counts of each data set
    is_best: Callable[[int], bool] = lambda step: False  # whether the state of this step, just evaluated, is to be kept as one of the best
    ended: Callable[[], bool] = lambda: False  # whether evaluations have said that it is not worth going on


@dataclass
class Outcome:
    """Where the loop ended."""

    state: Any
    step: int
    position: int
    window: Window
    stopped: str | None = None  # the signal, or "stop_after_steps"
    ended_early: bool = False  # held-out data got no better any more
    first_step_at: float | None = None  # time.time() at the end of the first step
    first_step_seconds: float = 0.0


@dataclass
class _Started:
    """A step that was started and whose metrics have not been fetched."""

    number: int
    position: int  # rows of the stream used with it
    batch: Batch
    metrics: dict[str, jax.Array]
    done_at: float | None = None  # time.perf_counter() when it was first seen to have ended


def train(
    state: Any,
    step: int,
    position: int,
    total_steps: int,
    batches: Iterator[tuple[int, Batch]],
    to_device: Callable[[Batch], Batch],
    train_step: Callable[[Any, Batch], tuple[Any, dict[str, jax.Array]]],
    config: Config,
    hooks: Hooks,
    window: Window,
    log: MetricsLog | None,
    progress: Progress,
    profiler: Profiler,
    votes: Votes,
    watchdog: Watchdog,
) -> Outcome:
    """Trains from `step` to `total_steps`, until it is asked to stop, or until held-out data get no better.

    Raises UserError when a loss or gradient is not finite and `train.nonfinite` is "abort". That is known two steps
    late, so the devices have made later steps by then; nothing of them, nor of the step itself, has been saved.
    """
    outcome = Outcome(state, step, position, window)
    first = step
    since = begun = time.perf_counter()  # since: the end of the step before, or of what was no training
    pending: collections.deque[_Started] = collections.deque()

    def look() -> None:
        """Notes the time for started steps that have ended by now, without waiting for one that has not."""
        for started in pending:
            if started.done_at is None:
                if not started.metrics["loss_sum"].is_ready():
                    return
                started.done_at = time.perf_counter()

    def settle(keep: int) -> None:
        """Fetches metrics of started steps until only `keep` are left unfetched."""
        nonlocal since
        while len(pending) > keep:
            started = pending.popleft()
            number, batch = started.number, started.batch
            metrics = jax.device_get(started.metrics)
            watchdog.step_ended()
            done_at = started.done_at or time.perf_counter()
            seconds, since = done_at - since, done_at
            metrics["attention_pairs"] = hooks.attention_pairs(batch)
            if number == first + 1:
                outcome.first_step_at, outcome.first_step_seconds = time.time(), done_at - begun
            if metrics["nonfinite"] and config.train.nonfinite == "abort":
                raise UserError(
                    f"step {number}: the loss or a gradient is not finite (loss {metrics['loss_sum'] / max(metrics['weight'], 1e-9):g}, "
                    f"gradient norm {metrics['grad_norm']:g}). The batch held {hooks.describe(batch)}. Look at these rows, lower "
                    "optim.learning_rate, or set train.nonfinite=skip to leave such steps out. "
                    f"The same command continues {hooks.resume_point()}."
                )
            hooks.keep_examples(number, started.position, metrics)
            window.add(metrics, None if number == first + 1 else seconds)  # the first one compiles
            if is_recorded(number):
                with votes.deferred():
                    record(number, started.position)
        votes.count(len(pending))

    def is_recorded(number: int) -> bool:
        return number % config.log.every == 0 or number == total_steps

    def record(number: int, position: int) -> None:
        values = {**hooks.used(position), **window.take()}
        progress.record(number, values)
        if log is not None:
            log.write(number, TRAIN, values)

    def paused(action: Callable[[], None]) -> None:
        """Runs what is not training with all started steps done, and leaves its time out of the rates."""
        nonlocal since
        settle(0)
        jax.block_until_ready(outcome.state)
        with watchdog.longer():
            action()
        since = time.perf_counter()

    for next_position, batch in batches:
        look()
        outcome.ended_early = outcome.step < total_steps and hooks.ended()
        if outcome.step >= total_steps or votes.failed or outcome.ended_early:
            break
        made = outcome.step - first
        outcome.stopped = votes.stop or (STOP_AFTER_STEPS if made and made == config.train.stop_after_steps else None)
        if outcome.stopped:
            break
        if profiler.begins(made):
            settle(0)
            with votes.deferred():
                profiler.start()
        outcome.step += 1
        end_update = hooks.begin_update(outcome.state) if is_recorded(outcome.step) else None
        outcome.state, metrics = train_step(outcome.state, to_device(batch))
        if end_update is not None:
            metrics["update_ratio"] = end_update(outcome.state)
        outcome.position = next_position
        pending.append(_Started(outcome.step, next_position, batch, metrics))
        look()
        settle(_LATE if made else 0)
        with votes.deferred():
            hooks.check()
        progress.step(outcome.step)
        if profiler.ends(made + 1):
            settle(0)
            with votes.deferred():
                profiler.stop()
        last = outcome.step == total_steps
        if config.eval.due(outcome.step) and not last and not votes.stop:
            paused(lambda: hooks.evaluate(outcome.state, outcome.step))
        due = config.checkpoint.every and outcome.step % config.checkpoint.every == 0
        if (due or hooks.is_best(outcome.step)) and not last and not votes.stop:
            paused(lambda: hooks.save(outcome.state, outcome.step, outcome.position, window))
    settle(0)
    votes.raise_failure()
    if not outcome.stopped and not outcome.ended_early and outcome.step < total_steps:
        raise RuntimeError(f"the data ended after step {outcome.step} of {total_steps}")
    return outcome
