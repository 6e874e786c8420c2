"""Parameter groups: for each parameter a learning-rate factor, weight decay or freezing, chosen by patterns on its path."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from sft_jax.config import OptimConfig
from sft_jax.errors import UserError
from sft_jax.model.adapters import AdapterPlan, is_trained

STACKED = ("layers", "expert")  # logical axes, always the first ones, along which whole parameters lie side by side


@dataclass(frozen=True)
class Choice:
    """What the groups chose for one parameter."""

    path: str
    shape: tuple[int, ...]
    pattern: str  # of the group that matched first, or ""
    learning_rate: float  # factor on the schedule
    weight_decay: float
    frozen: bool
    parameters: int  # how many numbers of the model it holds: not its size where they are stored in few bits
    matrix: bool  # a matrix or a stack of them: a kernel, an embedding; else a norm, a bias, a number for each head
    optimizer: str = ""  # what moves it, where the optimizer is made of several


def choose_groups(
    config: OptimConfig, params, adapters: AdapterPlan | None = None, lora_plus: float = 1.0
) -> tuple[Choice, ...]:
    """Returns what `config.groups` choose for each parameter: the first group whose pattern is found in its path.

    A path is what the decoder documents, such as `runs.0.0.attention.query.kernel`; a stack of layers is one parameter.
    A group may set `learning_rate` (a factor), `weight_decay` or `freeze`; one that sets nothing shields what it
    matches from the groups after it. Raises UserError for a group that is wrong or is first for no parameter.

    With `adapters` all parameters are frozen but those that they train, and groups choose among these alone. Matrices
    that begin with zero learn `lora_plus` times as fast (LoRA+, Hayou et al. 2024, arXiv:2402.12354). Quantised kernels are
    frozen in any case.
    """
    groups = [_check_group(index, group) for index, group in enumerate(config.groups)]
    firsts: set[int] = set()
    choices = []
    for path, variable in variables(params):
        name = parameter_path(path)
        trained = not _is_quantised(variable) and (adapters is None or is_trained(adapters, name))
        first = next((i for i, group in enumerate(groups) if trained and group["pattern"].search(name)), None)
        firsts.add(first)
        group = {} if first is None else groups[first]
        matrix = len(variable.shape) - stack_rank(variable) >= 2
        choices.append(
            Choice(
                path=name,
                shape=tuple(variable.shape),
                pattern=group["pattern"].pattern if group else "",
                learning_rate=group.get("learning_rate", 1.0) * (lora_plus if _begins_with_zero(name) else 1.0),
                weight_decay=group.get("weight_decay", config.weight_decay if matrix else 0.0),
                frozen=group.get("freeze", not trained),
                parameters=math.prod(variable.shape) * _numbers(variable),
                matrix=matrix,
            )
        )
    for index, group in enumerate(groups):
        pattern = group["pattern"]
        if index not in firsts:
            open_to_groups = [choice for choice in choices if adapters is None or is_trained(adapters, choice.path)]
            taken = any(pattern.search(choice.path) for choice in open_to_groups)
            none = "matches no parameter" + ("" if adapters is None else " that the adapters train")
            why = "matches only parameters that an earlier group has" if taken else none
            paths = ", ".join(choice.path for choice in open_to_groups[:4])
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


def is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _begins_with_zero(name: str) -> bool:
    """Returns whether a parameter is the matrix of an adapter that begins with zero: b, but for the embedding a."""
    return name.endswith(".adapter.a" if name.startswith("embed.") else ".adapter.b")


def variables(tree) -> list[tuple[Any, Any]]:
    """Returns the parameters of a tree, nnx Variables or bare arrays, with their paths."""
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)


def _is_quantised(variable) -> bool:
    return is_variable(variable) and "numbers" in variable.get_metadata()


def _numbers(variable) -> int:
    """Returns how many numbers of the model an element stands for, see `QuantisedKernel`."""
    return variable.get_metadata()["numbers"] if _is_quantised(variable) else 1


def stack_rank(variable) -> int:
    """Returns how many of the first dimensions of a parameter only stack others; of a bare array none does."""
    axes = (variable.get_metadata().get("axes") if is_variable(variable) else None) or ()
    return sum(axis in STACKED for axis in axes)
