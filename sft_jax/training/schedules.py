"""Learning-rate schedules: a linear warm-up to the peak, and then one of several shapes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.config import OptimConfig
from sft_jax.errors import UserError, did_you_mean

_MOST = 2**31 - 1  # updates that an int32 counts


class Numbers(NamedTuple):
    """What of a schedule a compiled step may take as arguments: of a program with these as constants there would be one for
    every learning rate and every length of a run."""

    learning_rate: np.float32 | jax.Array  # at the peak
    warmup: np.int32 | jax.Array  # updates, at least 1
    total: np.int32 | jax.Array  # updates of the run
    decay: np.int32 | jax.Array  # of "wsd": updates at the end, at least 1


class Moment(NamedTuple):
    """Where an update stands in the run. The last update of the warm-up has the peak and progress 0."""

    number: jax.Array  # int32 [], from 1 on
    progress: jax.Array  # fp32 [], from 0 at the peak to 1, which is reached exactly at the last update and stays
    numbers: Numbers

    @property
    def left(self) -> jax.Array:
        """1 - progress, without the cancellation that a root would show near the end."""
        return jnp.clip((self.numbers.total - self.number) / jnp.maximum(self.numbers.total - self.numbers.warmup, 1), 0.0, 1.0)


def _constant(moment: Moment, config: OptimConfig) -> jax.Array:
    del config
    return jnp.ones_like(moment.progress)


def _linear(moment: Moment, config: OptimConfig) -> jax.Array:
    return _between(config.final_fraction, moment.left)


def _cosine(moment: Moment, config: OptimConfig) -> jax.Array:
    return _between(config.final_fraction, 0.5 * (1 + jnp.cos(jnp.pi * moment.progress)))


def _polynomial(moment: Moment, config: OptimConfig) -> jax.Array:
    return _between(config.final_fraction, moment.left**config.power)


def _inverse_sqrt(moment: Moment, config: OptimConfig) -> jax.Array:
    """sqrt(warm-up / number of the update) (Vaswani et al., arXiv:1706.03762, section 5.3), which is 1 at the end of the
    warm-up. It has no end of its own: `final_fraction` is what it never falls below."""
    return jnp.maximum(jnp.sqrt(moment.numbers.warmup / moment.number), config.final_fraction)


def _wsd(moment: Moment, config: OptimConfig) -> jax.Array:
    """Warm-up, stable, decay (Hu et al., arXiv:2404.06395), which is linear here (Hägele et al., arXiv:2405.18392): the
    peak until the last `decay` updates, which fall in equal steps to `final_fraction`."""
    left = jnp.clip((moment.numbers.total - moment.number) / moment.numbers.decay, 0.0, 1.0)
    return _between(config.final_fraction, left)


def _between(final: float, left: jax.Array) -> jax.Array:
    """Returns 1 where `left`, the share of the way that is left, is 1, and exactly `final` where it is 0."""
    return final + (1 - final) * left


@dataclass(frozen=True)
class ScheduleEntry:
    """`shape(moment, config)` is the factor on the peak after the warm-up; `keys` are the ones of `optim` that it reads."""

    shape: Callable[[Moment, OptimConfig], jax.Array]
    keys: tuple[str, ...] = ()


SCHEDULES: dict[str, ScheduleEntry] = {
    "constant": ScheduleEntry(_constant),
    "linear": ScheduleEntry(_linear, ("final_fraction",)),
    "cosine": ScheduleEntry(_cosine, ("final_fraction",)),
    "polynomial": ScheduleEntry(_polynomial, ("final_fraction", "power")),
    "inverse_sqrt": ScheduleEntry(_inverse_sqrt, ("final_fraction",)),
    "wsd": ScheduleEntry(_wsd, ("final_fraction", "decay")),
}


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the number of updates made so far; see `make_schedule`."""

    config: OptimConfig
    numbers: Numbers

    def given(self, numbers: Numbers) -> "Schedule":
        """Returns the same shape with other numbers, such as those that a compiled step is given."""
        return dataclasses.replace(self, numbers=numbers)

    def __call__(self, step: jax.Array) -> jax.Array:
        """Returns the learning rate, fp32, of the update after `step` others, int32."""
        step = jnp.asarray(step, jnp.int32)
        peak, warmup, total, _ = self.numbers
        rising = jnp.where(step + 1 == warmup, 1.0, (step + 1) / warmup)  # a compiled quotient may miss 1
        progress = (step - (warmup - 1)) / jnp.maximum(total - warmup, 1)
        # Compiled division may miss 1 by a bit, and the end is to be exact.
        progress = jnp.where(step >= total - 1, 1.0, jnp.clip(progress, 0.0, 1.0))
        falling = SCHEDULES[self.config.schedule].shape(Moment(step + 1, progress, self.numbers), self.config)
        return peak * jnp.where(step < warmup, rising, falling).astype(jnp.float32)


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates made so far.

    The learning rate rises linearly over W warm-up updates, of which the last has the peak, and then follows the shape
    of `SCHEDULES`, which all but `constant` and `inverse_sqrt` end at `final_fraction` of the peak: update number
    `total_steps` has exactly that, and so has any later one. For the update after `step` others, with
    progress = (step - (W - 1)) / (total_steps - W) and W at least 1:

        learning_rate * (step + 1) / W        step < W
        learning_rate * shape                 step >= W

    Raises UserError for an unknown name, a key that the chosen schedule does not read, and phases that do not fit.
    """
    if config.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule: '{config.schedule}' is unknown; {did_you_mean(config.schedule, SCHEDULES)}.")
    entry = SCHEDULES[config.schedule]
    for key in ("final_fraction", "power", "decay"):
        if key not in entry.keys and getattr(config, key) != getattr(OptimConfig, key):
            raise UserError(f"optim.{key}: does nothing with optim.schedule={config.schedule}; leave it out.")
    for key in ("warmup", *(("decay",) if "decay" in entry.keys else ())):
        value = getattr(config, key)
        if value >= 1 and value != round(value):
            raise UserError(f"optim.{key}: {value} is neither a fraction below 1 nor a whole number of steps.")
    if config.warmup > 1 and config.warmup >= total_steps:
        raise UserError(
            f"optim.warmup: {config.warmup:g} steps of warm-up leave no step of the {total_steps} after them; "
            "lower it, or give a fraction below 1."
        )
    warmup = max(min(_steps(config.warmup, total_steps), total_steps - 1), 1)
    if "decay" in entry.keys:
        _check_decay(config, warmup, total_steps)

    decay = max(min(_steps(config.decay, total_steps), total_steps - warmup), 1)
    counts = (np.int32(min(count, _MOST)) for count in (warmup, total_steps, decay))
    return Schedule(config, Numbers(np.float32(config.learning_rate), *counts))


def _steps(value: float, total_steps: int) -> int:
    """Returns a phase in steps; below 1 it is a fraction of all."""
    return int(value) if value >= 1 else round(value * total_steps)


def _check_decay(config: OptimConfig, warmup: int, total_steps: int) -> None:
    fractions = config.warmup < 1 and config.decay < 1
    if fractions and config.warmup + config.decay <= 1:
        return  # where they do not fit, that is for rounding, and the decay is cut
    if _steps(config.decay, total_steps) > total_steps - warmup:
        raise UserError(
            f"optim.decay: a decay of {config.decay:g} does not fit behind a warm-up of {config.warmup:g} in the {total_steps} "
            "steps of the run; lower one of them (below 1 they are fractions of all steps)."
        )
