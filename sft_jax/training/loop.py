"""The loop: batches through the step, and what happens between steps. It composes and computes nothing.

Metrics are fetched two steps late, so the host never waits for the step it has just started.
"""

import collections
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from sft_jax.batch import Batch
from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.training.metrics import MetricsLog, Progress, Window
from sft_jax.training.signals import StopSignal

_LATE = 2  # steps


@dataclass
class Hooks:
    """What the run does between steps. All processes call all of them at the same steps."""

    evaluate: Callable[[Any, int], None]  # (state, step)
    save: Callable[[Any, int, int], None]  # (state, step, position)
    check: Callable[[], None]  # raises what a save in the background met
    describe: Callable[[Batch], str]  # names the examples of a batch, for the message about a step that went wrong
    attention_pairs: Callable[[Batch], int]  # of a batch, over all processes


@dataclass
class Outcome:
    """Where the loop ended."""

    state: Any
    step: int
    position: int
    stopped: str | None = None  # the signal, or "stop_after_steps"
    first_step_at: float | None = None  # time.time() at the end of the first step
    window: Window | None = None  # sums over the steps of this process
    last: dict[str, float] = field(default_factory=dict)  # last record of the log


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
    log: MetricsLog | None,
    progress: Progress,
    stop: StopSignal,
) -> Outcome:
    """Trains from `step` to `total_steps`, or until it is asked to stop.

    Raises UserError when a loss or gradient is not finite and `train.nonfinite` is "abort"; the state of the last
    good step is on the devices then, and in the newest checkpoint.
    """
    outcome = Outcome(state, step, position)
    first = step
    window = Window()
    pending: collections.deque[tuple[int, Batch, dict[str, jax.Array]]] = collections.deque()
    profiling = False

    def settle(keep: int) -> None:
        """Fetches metrics of started steps until only `keep` are left unfetched."""
        while len(pending) > keep:
            number, batch, metrics = pending.popleft()
            metrics = jax.device_get(metrics) | {"attention_pairs": hooks.attention_pairs(batch)}
            if outcome.first_step_at is None:
                outcome.first_step_at = time.time()
            if metrics["nonfinite"] and config.train.nonfinite == "abort":
                raise UserError(
                    f"step {number}: the loss or a gradient is not finite (loss {metrics['loss_sum'] / max(metrics['weight'], 1e-9):g}, "
                    f"gradient norm {metrics['grad_norm']:g}); the state was left as it was. The batch held {hooks.describe(batch)}. "
                    "Look at these rows, lower optim.learning_rate, or set train.nonfinite=skip to leave such steps out."
                )
            window.add(metrics, timed=number > first + 1)
            if number % config.log.every == 0 or number == total_steps:
                record(number)

    def record(number: int) -> None:
        outcome.last = window.take()
        progress.record(number, outcome.last)
        if log is not None:
            log.write(number, "train", outcome.last)

    def paused(action: Callable[[], None]) -> None:
        """Runs what is not training with all started steps done, and leaves its time out of the rates."""
        settle(0)
        jax.block_until_ready(outcome.state)
        start = time.perf_counter()
        action()
        window.pause(time.perf_counter() - start)

    for next_position, batch in batches:
        if outcome.step >= total_steps:
            break
        if stop.requested(outcome.step):
            outcome.stopped = stop.name or "SIGTERM in another process"
            break
        if config.train.stop_after_steps and outcome.step - first >= config.train.stop_after_steps:
            outcome.stopped = "stop_after_steps"
            break
        if config.train.profile and outcome.step - first == 2:
            settle(0)
            profiling = _start_trace(config, log)
        outcome.state, metrics = train_step(outcome.state, to_device(batch))
        outcome.step += 1
        outcome.position = next_position
        pending.append((outcome.step, batch, metrics))
        settle(_LATE if outcome.step > first + 1 else 0)
        hooks.check()
        progress.step(outcome.step)
        if profiling and outcome.step - first == 2 + config.train.profile:
            settle(0)
            jax.profiler.stop_trace()
            profiling = False
        last = outcome.step == total_steps
        if config.eval.every and outcome.step % config.eval.every == 0 and not last:
            paused(lambda: hooks.evaluate(outcome.state, outcome.step))
        if config.checkpoint.every and outcome.step % config.checkpoint.every == 0 and not last:
            paused(lambda: hooks.save(outcome.state, outcome.step, outcome.position))
    settle(0)
    if profiling:
        jax.profiler.stop_trace()
    if not outcome.stopped and outcome.step < total_steps:
        raise RuntimeError(f"the data ended after step {outcome.step} of {total_steps}")
    if outcome.step > first and outcome.step % config.log.every and outcome.step < total_steps:
        window.take()  # the part of a window that a stop cut off counts in the totals
    outcome.window = window
    return outcome


def _start_trace(config: Config, log: MetricsLog | None) -> bool:
    jax.profiler.start_trace(str(log.profile_folder) if log is not None else "/dev/null")
    return True
