"""The optimizer of a run: what turns gradients into new parameters.

It is three things that the step puts together: a transformation of gradients into directions, which knows no learning
rate (`optimizers`); a schedule, a function of the number of updates made so far (`schedules`); and for each parameter
a choice of learning-rate factor, weight decay or freezing (`groups`). One update is

    p <- p - schedule(step) * factor * (direction + weight_decay * p)

so weight decay is decoupled (Loshchilov & Hutter, arXiv:1711.05101) in every optimizer. By default it applies to
kernels and embeddings, and to no norm, no bias and nothing else that is no matrix.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sft_jax.config import OptimConfig
from sft_jax.errors import UserError, did_you_mean
from sft_jax.model.adapters import AdapterPlan
from sft_jax.training.average import move_average, start_average
from sft_jax.training.groups import Choice, choose_groups, parameter_path, variables
from sft_jax.training.optimizers import OPTIMIZERS
from sft_jax.training.rounding import round_stochastic
from sft_jax.training.schedules import Numbers, make_schedule

CONSTANTS = ("b1", "b2", "eps", "momentum")  # keys of `optim` that some optimizers read


class StepNumbers(NamedTuple):
    """What a compiled step takes as arguments, so that runs which differ in nothing else share it."""

    schedule: Numbers
    key: np.ndarray  # uint32: the data of the random key of the seed


@dataclass(frozen=True)
class Optimizer:
    """How gradients change parameters. Made by `make_optimizer`."""

    transform: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]  # updates made so far (int32 []) -> learning rate (fp32 []) of the next one
    clip_norm: float  # global norm that the mean gradient is cut to; 0 = never
    seed: int  # of the rounding of bfloat16 parameters, and of what is random in training
    choices: tuple[Choice, ...]  # one a parameter, in the order of the tree
    ema: float = 0.0  # decay of the average of the parameters; 0 = none is kept
    key_data: jax.Array | None = None  # of the random key, where a step is given it; else it is that of `seed`

    @property
    def numbers(self) -> StepNumbers:
        """What this optimizer would have a step be given."""
        return StepNumbers(self.schedule.numbers, np.asarray(jax.random.key_data(self.key)))

    def given(self, numbers: StepNumbers) -> "Optimizer":
        """Returns an optimizer that does the same with other numbers."""
        return dataclasses.replace(self, schedule=self.schedule.given(numbers.schedule), key_data=numbers.key)

    @property
    def key(self) -> jax.Array:
        """The random key of all that is random in training."""
        return jax.random.key(self.seed) if self.key_data is None else jax.random.wrap_key_data(self.key_data)

    def trainable(self, path, value) -> bool:
        """A filter for `nnx.split`: whether the parameter at `path` is trained."""
        del value
        return not self._choices[parameter_path(path)].frozen

    def init(self, params):
        """Returns the optimizer state of the trainable parameters."""
        return self.transform.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(self, gradients, opt_state, params, step: jax.Array):
        """Returns new parameters and optimizer state; `gradients` are fp32, `step` counts the updates before this one.

        Parameters in bfloat16 are rounded stochastically, with bits that depend on `step` and the path only.
        """
        exact = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        directions, opt_state = self.transform.update(gradients, opt_state, exact)
        learning_rate = self.schedule(step)
        key = jax.random.fold_in(self.key, step)
        order = {path: index for index, path in enumerate(self._choices)}

        def move(path, p, p_exact, direction):
            choice = self._choices[parameter_path(path)]
            new = p_exact - learning_rate * choice.learning_rate * (direction + choice.weight_decay * p_exact)
            if p.dtype == jnp.float32:
                return new
            # From 2**31 on: the numbers below are those of micro-batches.
            return round_stochastic(new, p.dtype, jax.random.fold_in(key, 2**31 + order[choice.path]))

        return jax.tree_util.tree_map_with_path(move, params, exact, directions), opt_state

    def init_average(self, params: nnx.State) -> nnx.State:
        """Returns the average of the trainable parameters before the first update; an empty state where none is kept."""
        return start_average(params) if self.ema else nnx.State({})

    def update_average(self, average: nnx.State, params: nnx.State, step: jax.Array) -> nnx.State:
        """Returns the average with `params`, which the update after `step` others has made."""
        return move_average(average, params, self.ema, step + 1) if self.ema else average

    @functools.cached_property
    def _choices(self) -> dict[str, Choice]:
        return {choice.path: choice for choice in self.choices}

    def log(self) -> list[str]:
        """Returns a line for each parameter: path, shape, what moves it and what the groups chose for it."""
        width = max(len(choice.path) for choice in self.choices)
        lines = []
        for choice in self.choices:
            chosen = f"{choice.optimizer}  learning_rate x{choice.learning_rate:g}  weight_decay {choice.weight_decay:g}"
            why = f"  ({choice.pattern})" if choice.pattern else ""
            shape = "x".join(map(str, choice.shape))
            lines.append(f"{choice.path:{width}}  {shape:>16}  {'frozen' if choice.frozen else chosen}{why}")
        return lines


def make_optimizer(
    config: OptimConfig,
    params,
    total_steps: int,
    seed: int = 0,
    adapters: AdapterPlan | None = None,
    lora_plus: float = 1.0,
) -> Optimizer:
    """Returns the optimizer for `params`, arrays or abstract values: `nnx.state(decoder)`, or a tree of bare arrays.

    With `adapters` it moves what they train and nothing else.
    First moments have the dtype `config.state_dtype`, by default that of the trained parameters; second moments are fp32.
    Raises UserError for an unknown name, a key that the chosen optimizer or schedule does not read, and a group that
    is wrong or matches nothing.
    """
    if config.name not in OPTIMIZERS:
        raise UserError(f"optim.name: '{config.name}' is unknown; {did_you_mean(config.name, OPTIMIZERS)}.")
    entry = OPTIMIZERS[config.name]
    given = {key: value for key in CONSTANTS if (value := getattr(config, key)) is not None}
    for key in given:
        if key not in entry.keys:
            raise UserError(f"optim.{key}: does nothing with optim.name={config.name}; leave it out.")
    constants = {**entry.keys, **given}
    if config.state_dtype and not entry.first_moment(constants):
        raise UserError(f"optim.state_dtype: is that of first moments, and optim.name={config.name} keeps none here; leave it out.")
    part = entry.part or (lambda choice: config.name)
    groups = choose_groups(config, params, adapters, lora_plus)
    choices = tuple(dataclasses.replace(choice, optimizer=part(choice)) for choice in groups)
    trained = [p for (_, p), choice in zip(variables(params), choices, strict=True) if not choice.frozen]
    return Optimizer(
        transform=entry.make(constants, config.state_dtype or jnp.result_type(*jax.tree.leaves(trained)), choices),
        schedule=make_schedule(config, total_steps),
        clip_norm=config.clip_norm,
        seed=seed,
        choices=choices,
        ema=config.ema,
    )
