"""Optimizers from raw optax pieces: transformations of gradients into directions, which know no learning rate."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax import contrib

from sft_jax.model.adapters import is_adapter
from sft_jax.training.groups import Choice, is_variable, parameter_path, stack_rank, variables

Constants = Mapping[str, float]  # by key of `optim`
_LIKE_ADAM = 0.2  # root mean square of Adam's directions in practice, which Muon's are scaled to


def _adamw(constants: Constants, dtype, choices: Sequence[Choice]) -> optax.GradientTransformation:
    """Adam (Kingma & Ba, arXiv:1412.6980). First moments have the dtype `dtype`, second moments are fp32 whatever it is:
    with b2 = 0.999 a bfloat16 second moment is stuck, since one step changes it by less than half of its last bit."""
    del choices
    return optax.scale_by_adam(constants["b1"], constants["b2"], constants["eps"], mu_dtype=dtype)


def _adafactor(constants: Constants, dtype, choices: Sequence[Choice]) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern, arXiv:1804.04235) with optax's constants: no momentum, second moments factored from
    128 x 128, each matrix clipped to a root mean square of 1, the step relative to the root mean square of the matrix.
    A stack is treated layer by layer and expert by expert. The step of an adapter, of which one matrix begins with zero,
    is the learning rate itself, as with Adam."""
    del constants, dtype, choices
    parts = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    absolute, relative = optax.chain(*parts), optax.chain(*parts, optax.scale_by_param_block_rms())
    return _each_in_stack(lambda path: absolute if is_adapter(path) else relative)


def _lion(constants: Constants, dtype, choices: Sequence[Choice]) -> optax.GradientTransformation:
    """Lion (Chen et al., arXiv:2302.06675): the sign of a momentum. Every number moves by the whole learning rate, which
    is to be 3 to 10 times smaller than Adam's, and the weight decay as many times larger."""
    del choices
    return optax.scale_by_lion(constants["b1"], constants["b2"], mu_dtype=dtype)


def _sgd(constants: Constants, dtype, choices: Sequence[Choice]) -> optax.GradientTransformation:
    """Gradient descent with heavy-ball momentum, v <- momentum * v + gradient; without momentum it has no state."""
    del choices
    return optax.trace(constants["momentum"], accumulator_dtype=dtype) if constants["momentum"] else optax.identity()


def _muon(constants: Constants, dtype, choices: Sequence[Choice]) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): Nesterov momentum, orthogonalised by five Newton-Schulz steps, for every matrix of the
    blocks by itself; Adam for embeddings, head, norms and biases.

    Directions are scaled by 0.2 * sqrt(max(in, out)), which gives them the root mean square of Adam's, so that one
    learning rate and one weight decay serve both (Liu et al., arXiv:2502.16982, section 2.2).
    """

    def matrices(tree):  # the last two dimensions, each of a stack by itself
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), tree)

    def scaled(directions, params):
        del params
        return jax.tree.map(lambda u: _LIKE_ADAM * math.sqrt(max(u.shape[-2:])) * u, directions)

    muon = contrib.scale_by_muon(beta=constants["momentum"], mu_dtype=dtype, weight_dimension_numbers=matrices)
    orthogonal = optax.chain(_layer_by_layer(muon), optax.stateless(scaled))
    return _split(
        {choice.path: choice.optimizer for choice in choices},
        {"muon": orthogonal, "adamw": _adamw(constants, dtype, choices)},
    )


def _layer_by_layer(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies optax's Muon to one layer of a stack after the other, with the numbers and the state that it has for all at once.

    What it multiplies is gathered, and so are no more than the matrices of one kernel of one layer at a time.
    """

    def update(updates, state, params=None):
        del params
        moved, momenta = {}, {}
        for path, gradient in updates.items():

            def of_layer(pair, path=path):
                direction, after = muon.update({path: pair[0]}, state._replace(mu={path: pair[1]}))
                return direction[path], after.mu[path]

            over = functools.partial(jax.lax.map, of_layer) if len(gradient.shape) > 2 else of_layer
            moved[path], momenta[path] = over((gradient, state.mu[path]))
        return moved, state._replace(count=optax.safe_increment(state.count), mu=momenta)

    return optax.GradientTransformation(muon.init, update)


def _matrices_of_blocks(choice: Choice) -> str:
    return "muon" if choice.matrix and choice.path.startswith("runs.") else "adamw"


def _split(names: Mapping[str, str], transforms: Mapping[str, optax.GradientTransformation]):
    """Applies to each parameter the one of `transforms` that `names` gives for its path.

    The state is a dict of theirs, each over a dict path -> parameter. (optax.partition would leave masks inside nnx
    Variables, which then have no shape to be laid out by.)
    """

    def parts(tree) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {name: {} for name in transforms}
        for path, variable in variables(tree):
            found[names[parameter_path(path)]][parameter_path(path)] = variable
        return found

    def init(params):
        return {name: transforms[name].init(part) for name, part in parts(params).items()}

    def update(updates, state, params):
        params_of, moved, new_state = parts(params), {}, {}
        for name, part in parts(updates).items():
            directions, new_state[name] = transforms[name].update(part, state[name], params_of[name])
            moved |= directions
        return _in_order_of(updates, moved), new_state

    return optax.GradientTransformation(init, update)


def _each_in_stack(transform_of: Callable[[str], optax.GradientTransformation]) -> optax.GradientTransformation:
    """Applies `transform_of(path)` to each parameter, and to each layer and expert of a stack, on its own."""

    def over(function: Callable, variable) -> Callable:
        for _ in range(stack_rank(variable)):
            function = jax.vmap(function)
        return function

    def init(params):
        named = [(parameter_path(path), p) for path, p in variables(params)]
        return {path: over(transform_of(path).init, p)(p) for path, p in named}

    def update(updates, state, params):
        named = [(parameter_path(path), p, u) for (path, p), (_, u) in zip(variables(params), variables(updates), strict=True)]
        new = {path: over(transform_of(path).update, p)(u, state[path], p) for path, p, u in named}
        return _in_order_of(updates, {path: u for path, (u, _) in new.items()}), {path: s for path, (_, s) in new.items()}

    return optax.GradientTransformation(init, update)


def _in_order_of(tree, by_path: Mapping[str, Any]):
    """Returns a tree like `tree` with the parameters of `by_path`."""
    structure = jax.tree.structure(tree, is_leaf=is_variable)
    return structure.unflatten([by_path[parameter_path(path)] for path, _ in variables(tree)])


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer.

    Attributes:
        make: (constants, dtype of first moments, choices) -> the transformation; second moments are fp32.
        keys: the keys of `optim` that are its constants, with the values that they have unless they are set.
        part: what moves a parameter, where the optimizer is made of several.
        first_moment: whether it keeps one, with its constants.
    """

    make: Callable[[Constants, Any, Sequence[Choice]], optax.GradientTransformation]
    keys: Constants
    part: Callable[[Choice], str] | None = None
    first_moment: Callable[[Constants], bool] = lambda constants: True


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(_adamw, {"b1": 0.9, "b2": 0.999, "eps": 1e-8}),
    "adafactor": OptimizerEntry(_adafactor, {}, first_moment=lambda constants: False),
    "lion": OptimizerEntry(_lion, {"b1": 0.9, "b2": 0.99}),
    "muon": OptimizerEntry(_muon, {"momentum": 0.95, "b1": 0.9, "b2": 0.999, "eps": 1e-8}, _matrices_of_blocks),
    "sgd": OptimizerEntry(_sgd, {"momentum": 0.9}, first_moment=lambda constants: constants["momentum"] > 0),
}
