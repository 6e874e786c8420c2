"""Optimizers, schedules and parameter groups, from raw optax pieces.

An optimizer here is three things that the step puts together: a transformation of gradients into directions, which
knows no learning rate; a schedule, a function of the number of updates made so far; and for each parameter a choice of
learning-rate factor, weight decay or freezing. One update is

    p <- p - schedule(step) * factor * (direction + weight_decay * p)

so weight decay is decoupled (Loshchilov & Hutter, arXiv:1711.05101) in every optimizer. By default it applies to
kernels and embeddings, and to no norm and no bias.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sft_jax.config import OptimConfig
from sft_jax.errors import UserError, did_you_mean
from sft_jax.training.rounding import round_stochastic

Schedule = Callable[[jax.Array], jax.Array]


def _adamw(config: OptimConfig, dtype) -> optax.GradientTransformation:
    """Adam (Kingma & Ba, arXiv:1412.6980). First moments have the dtype of the parameters, second moments are fp32:
    with b2 = 0.999 a bfloat16 second moment is stuck, since one step changes it by less than half of its last bit."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)


def _adafactor(config: OptimConfig, dtype) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern, arXiv:1804.04235) with optax's constants: no momentum, second moments factored from
    128 x 128, each matrix clipped to a root mean square of 1, the step relative to the root mean square of the matrix.
    A stack of layers is treated layer by layer."""
    del config, dtype
    return _each_layer(
        optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    )


def _each_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `transform` to each parameter, and to each layer of a stack, on its own."""

    def over(function: Callable, variable) -> Callable:
        return jax.vmap(function) if _axes(variable)[:1] == ("layers",) else function

    def init(params):
        return {parameter_path(path): over(transform.init, p)(p) for path, p in _variables(params)}

    def update(updates, state, params):
        new = {
            parameter_path(path): over(transform.update, p)(u, state[parameter_path(path)], p)
            for (path, p), (_, u) in zip(_variables(params), _variables(updates), strict=True)
        }
        structure = jax.tree.structure(updates, is_leaf=_is_variable)
        return structure.unflatten([u for u, _ in new.values()]), {path: part for path, (_, part) in new.items()}

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class OptimizerEntry:
    """`make(config, dtype of the parameters)` gives the transformation; `keys` are the constants that it reads."""

    make: Callable[[OptimConfig, Any], optax.GradientTransformation]
    keys: tuple[str, ...]


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(_adamw, ("b1", "b2", "eps")),
    "adafactor": OptimizerEntry(_adafactor, ()),
}

# name -> f(progress, final): the factor after warm-up; progress goes from 0 to 1, reached exactly at the last step.
SCHEDULES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "constant": lambda progress, final: jnp.ones_like(progress),
    "linear": lambda progress, final: final + (1 - final) * (1 - progress),
    "cosine": lambda progress, final: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}


@dataclass(frozen=True)
class Choice:
    """What the groups chose for one parameter."""

    path: str
    shape: tuple[int, ...]
    pattern: str  # of the group that matched first, or ""
    learning_rate: float  # factor on the schedule
    weight_decay: float
    frozen: bool


@dataclass(frozen=True)
class Optimizer:
    """How gradients change parameters. Made by `make_optimizer`."""

    transform: optax.GradientTransformation
    schedule: Schedule  # updates made so far (int32 []) -> learning rate (fp32 []) of the next one
    clip_norm: float  # global norm that the mean gradient is cut to; 0 = never
    seed: int  # of the rounding of bfloat16 parameters, and of what is random in training
    choices: tuple[Choice, ...]  # one a parameter, in the order of the tree

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
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        order = {path: index for index, path in enumerate(self._choices)}

        def move(path, p, p_exact, direction):
            choice = self._choices[parameter_path(path)]
            new = p_exact - learning_rate * choice.learning_rate * (direction + choice.weight_decay * p_exact)
            if p.dtype == jnp.float32:
                return new
            # From 2**31 on: the numbers below are those of micro-batches.
            return round_stochastic(new, p.dtype, jax.random.fold_in(key, 2**31 + order[choice.path]))

        return jax.tree_util.tree_map_with_path(move, params, exact, directions), opt_state

    @functools.cached_property
    def _choices(self) -> dict[str, Choice]:
        return {choice.path: choice for choice in self.choices}

    def log(self) -> list[str]:
        """Returns a line for each parameter: path, shape and what the groups chose for it."""
        width = max(len(choice.path) for choice in self.choices)
        lines = []
        for choice in self.choices:
            chosen = f"learning_rate x{choice.learning_rate:g}  weight_decay {choice.weight_decay:g}"
            why = f"  ({choice.pattern})" if choice.pattern else ""
            shape = "x".join(map(str, choice.shape))
            lines.append(f"{choice.path:{width}}  {shape:>16}  {'frozen' if choice.frozen else chosen}{why}")
        return lines


def make_optimizer(config: OptimConfig, params, total_steps: int, seed: int = 0) -> Optimizer:
    """Returns the optimizer for `params`, arrays or abstract values: `nnx.state(decoder)`, or a tree of bare arrays.

    Raises UserError for an unknown name, a key that the chosen optimizer or schedule does not read, and a group that
    is wrong or matches nothing.
    """
    if config.name not in OPTIMIZERS:
        raise UserError(f"optim.name: '{config.name}' is unknown; {did_you_mean(config.name, OPTIMIZERS)}.")
    entry = OPTIMIZERS[config.name]
    defaults = OptimConfig()
    for key in ("b1", "b2", "eps"):
        if key not in entry.keys and getattr(config, key) != getattr(defaults, key):
            raise UserError(f"optim.{key}: does nothing with optim.name={config.name}; leave it out.")
    choices = choose_groups(config, params)
    trained = [p for (_, p), choice in zip(_variables(params), choices, strict=True) if not choice.frozen]
    return Optimizer(
        transform=entry.make(config, jnp.result_type(*jax.tree.leaves(trained))),
        schedule=make_schedule(config, total_steps),
        clip_norm=config.clip_norm,
        seed=seed,
        choices=choices,
    )


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Returns the learning rate as a function of the number of updates made so far.

    The learning rate rises linearly over W warm-up updates, of which the last has the peak, and then follows
    `SCHEDULES` to `final_fraction` of the peak, which update number `total_steps` has exactly, and any later one. For
    the update after `step` others, with progress = (step - (W - 1)) / (total_steps - W) and W at least 1:

        learning_rate * (step + 1) / W              step < W
        learning_rate * f(progress, final_fraction) step >= W
    """
    if config.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule: '{config.schedule}' is unknown; {did_you_mean(config.schedule, SCHEDULES)}.")
    if config.schedule == "constant" and config.final_fraction != OptimConfig().final_fraction:
        raise UserError("optim.final_fraction: does nothing with optim.schedule=constant; leave it out.")
    if config.warmup >= 1 and config.warmup != round(config.warmup):
        raise UserError(f"optim.warmup: {config.warmup} is neither a fraction below 1 nor a whole number of steps.")
    if config.warmup > 1 and config.warmup >= total_steps:
        raise UserError(
            f"optim.warmup: {config.warmup:g} steps of warm-up leave no step of the {total_steps} after them; "
            "lower it, or give a fraction below 1."
        )
    steps = config.warmup if config.warmup >= 1 else min(round(config.warmup * total_steps), total_steps - 1)
    warmup, shape, final = max(int(steps), 1), SCHEDULES[config.schedule], config.final_fraction

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        rising = (step + 1) / warmup
        progress = (step - (warmup - 1)) / max(total_steps - warmup, 1)
        # Compiled division may miss 1 by a bit, and the end is to be exact.
        progress = jnp.where(step >= total_steps - 1, 1.0, jnp.clip(progress, 0.0, 1.0))
        falling = shape(progress, final)
        return config.learning_rate * jnp.where(step < warmup, rising, falling).astype(jnp.float32)

    return schedule


def choose_groups(config: OptimConfig, params) -> tuple[Choice, ...]:
    """Returns what `config.groups` choose for each parameter: the first group whose pattern is found in its path.

    A path is what the decoder documents, such as `runs.0.0.attention.query.kernel`; a stack of layers is one parameter.
    A group may set `learning_rate` (a factor), `weight_decay` or `freeze`; one that sets nothing shields what it
    matches from the groups after it. Raises UserError for a group that is wrong or is first for no parameter.
    """
    groups = [_check_group(index, group) for index, group in enumerate(config.groups)]
    firsts: set[int] = set()
    choices = []
    for path, variable in _variables(params):
        name = parameter_path(path)
        first = next((index for index, group in enumerate(groups) if group["pattern"].search(name)), None)
        firsts.add(first)
        group = {} if first is None else groups[first]
        rank = len([axis for axis in _axes(variable) if axis != "layers"])
        choices.append(
            Choice(
                path=name,
                shape=tuple(variable.shape),
                pattern=group["pattern"].pattern if group else "",
                learning_rate=group.get("learning_rate", 1.0),
                weight_decay=group.get("weight_decay", config.weight_decay if rank >= 2 else 0.0),
                frozen=group.get("freeze", False),
            )
        )
    for index, group in enumerate(groups):
        pattern = group["pattern"]
        if index not in firsts:
            taken = any(pattern.search(choice.path) for choice in choices)
            why = "matches only parameters that an earlier group has" if taken else "matches no parameter"
            paths = ", ".join(choice.path for choice in choices[:4])
            raise UserError(f"optim.groups[{index}].pattern: '{pattern.pattern}' {why}; paths look like {paths}.")
    if all(choice.frozen for choice in choices):
        raise UserError("optim.groups: freeze every parameter; nothing is left to train.")
    return tuple(choices)


def _check_group(index: int, group: dict[str, Any]) -> dict[str, Any]:
    """Returns a group with its pattern compiled, or raises UserError naming the key that is wrong."""
    key = f"optim.groups[{index}]"
    try:
        pattern = re.compile(group["pattern"])
    except re.error as error:
        raise UserError(f"{key}.pattern: '{group['pattern']}' is no regular expression: {error}.") from error
    for name in ("learning_rate", "weight_decay"):
        value = group.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise UserError(f"{key}.{name}: must be a number of 0 or more, not {value!r}.")
    freeze = group.get("freeze", False)
    if not isinstance(freeze, bool):
        raise UserError(f"{key}.freeze: must be true or false, not {freeze!r}.")
    for name in ("learning_rate", "weight_decay"):
        if freeze and name in group:
            raise UserError(f"{key}.{name}: does nothing where freeze is true; leave one of them out.")
    return {**group, "pattern": pattern}


def parameter_path(path) -> str:
    """Returns the path of a parameter with dots, from the keys of nnx or of jax.tree_util.

    >>> parameter_path(("runs", 0, 0, "mlp", "up", "kernel"))
    'runs.0.0.mlp.up.kernel'
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):
        path = path[:-1]  # the inside of an nnx.Variable
    return ".".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _variables(tree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable)


def _axes(variable) -> tuple[str | None, ...]:
    """Returns the logical axes of a parameter; of a bare array, as many unnamed ones as it has."""
    axes = variable.get_metadata().get("axes") if _is_variable(variable) else None
    return (None,) * len(variable.shape) if axes is None else tuple(axes)
