"""What must hold of training, as functions that measure it on any decoder and batch.

Each runs the code that training runs (the loss, the step, the evaluation step) in two ways that must agree, and returns
how far apart they are. Tests call them over families, layouts and kernels. Tolerances are for float32 on the CPU.

Letters: A micro-batches, B rows, L length, D hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sft_jax.batch import Batch, empty_batch
from sft_jax.config import LossConfig, OptimConfig
from sft_jax.evaluation.step import make_eval_step
from sft_jax.model.cross_entropy import cross_entropy
from sft_jax.model.decoder import Decoder
from sft_jax.model.isolation import isolation_breaches
from sft_jax.model.sharding import AnyMesh, pieces_along
from sft_jax.training.groups import choose_groups, parameter_path
from sft_jax.training.optim import Optimizer
from sft_jax.training.state import create_state
from sft_jax.training.step import make_train_step, place_batch


class Result(NamedTuple):
    """One measurement: the quantity that is furthest off, by how much, and how much it may be."""

    contract: str
    quantity: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def accumulation(
    decoder: Decoder, batch: Batch, parts: int, mesh: AnyMesh | None = None, loss: LossConfig = LossConfig()
) -> Result:
    """`parts` micro-batches == one batch: loss, counts and the gradient that a step computes. `parts` divides B."""
    whole = step_sums(decoder, jax.tree.map(lambda x: x[None], batch), mesh, loss)
    split = step_sums(decoder, jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch), mesh, loss)
    return _worst("accumulation", 1e-5, split, whole)


def packing(decoder: Decoder, batch: Batch, loss: LossConfig = LossConfig(), mesh: AnyMesh | None = None) -> Result:
    """Packed == one document a row: the loss of every token, relative where it is above 1, and the summed gradient, relative."""
    alone, source = unpack(batch, 1 if mesh is None else pieces_along(mesh, "batch"))
    packed_sums, alone_sums = (
        step_sums(decoder, jax.tree.map(lambda x: x[None], b), mesh, loss) for b in (batch, alone)
    )
    for sums in (packed_sums, alone_sums):
        del sums["loss of an example"]  # in another order
    packed_tokens, alone_tokens = token_losses(decoder, batch, mesh), token_losses(decoder, alone, mesh)
    supervised = alone.weights != 0
    expected = alone_tokens[supervised]
    difference = (packed_tokens[source[0][supervised], source[1][supervised]] - expected) / np.maximum(expected, 1)
    tokens = Result("packing", "loss of a token", float(np.abs(difference).max(initial=0)), 1e-5)
    return _further(tokens, _worst("packing", 1e-5, packed_sums, alone_sums))


def isolation(decoder: Decoder, batch: Batch) -> Result:
    """Changing the tokens of a document, or of the padding, leaves the logits of all others bit-equal."""
    forward = jax.jit(lambda d, tokens: d(tokens, batch.positions, batch.segments))
    breaches = isolation_breaches(lambda t: forward(decoder, t), batch.tokens, batch.segments, decoder.spec.vocab_size)
    return Result("isolation", "positions whose logits another document changed", float(len(breaches)), 0.0)


def layout(
    build: Callable[[AnyMesh | None], Decoder], batch: Batch, meshes: dict[str, AnyMesh], loss: LossConfig = LossConfig()
) -> dict[str, Result]:
    """One device == each of `meshes`: loss, counts and gradient. `build(mesh)` gives the same decoder for a mesh."""
    batch = jax.tree.map(lambda x: x[None], batch)
    one = step_sums(build(None), batch, None, loss)
    return {
        name: _worst("layout", 1e-5, step_sums(build(mesh), batch, mesh, loss), one) for name, mesh in meshes.items()
    }


def chunking(
    decoder: Decoder, batch: Batch, chunk: int | None, mesh: AnyMesh | None = None, loss: LossConfig = LossConfig()
) -> Result:
    """The chunked loss == dense cross-entropy in float64: values, and gradients of hidden states and head, adapters too."""
    products, vocab_axis = jax.jit(_head_products)(decoder, batch)
    vocab_axis = int(vocab_axis)
    vocab_size = decoder.spec.vocab_size
    terms = {"z_loss": loss.z_loss, "label_smoothing": loss.label_smoothing}

    def total(products):
        (hidden, kernel), *added = products
        sums = cross_entropy(
            hidden, kernel, batch.targets, batch.weights, vocab_axis=vocab_axis, vocab_size=vocab_size,
            soft_cap=decoder.logit_soft_cap, chunk=chunk, precision=decoder.options.dot_precision, mesh=mesh,
            added=added, **terms,
        )  # fmt: skip
        return sums.total, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(products)
    ours = {"loss": sums.total, "nll": sums.nll}
    # A sum of products is one product of what lies side by side.
    states, kernels = (np.concatenate(parts, axis) for parts, axis in zip(zip(*products), (-1, 1 - vocab_axis)))
    whole = dense_cross_entropy(
        states, kernels, batch.targets, batch.weights, vocab_axis, decoder.logit_soft_cap, vocab_size=vocab_size, **terms
    )
    ends = np.cumsum([hidden.shape[-1] for hidden, _ in products])[:-1]
    dense = {name: whole.pop(name) for name in ("loss", "nll")}
    parts = zip(np.split(whole["d hidden"], ends, -1), np.split(whole["d head"], ends, 1 - vocab_axis), strict=True)
    for number, (gradient, reference) in enumerate(zip(gradients, parts, strict=True)):
        for name, value, expected in zip(("hidden", "head"), gradient, reference, strict=True):
            ours[f"d {name} {number}"], dense[f"d {name} {number}"] = value, expected
    return _worst("chunking", 1e-5, ours, dense)


def evaluation(
    build: Callable[[AnyMesh | None], Decoder], batch: Batch, batch_sizes: Sequence[int], meshes: dict[str, AnyMesh]
) -> Result:
    """The loss of an evaluation set depends on neither the rows of a batch, packing nor the mesh."""
    reference = evaluate(build(None), batch, len(batch.tokens), None)
    means = {"one document a row": evaluate(build(None), unpack(batch)[0], batch_sizes[0], None)}
    for name, mesh in {"one device": None, **meshes}.items():
        decoder = build(mesh)
        means |= {f"in batches of {size} on {name}": evaluate(decoder, batch, size, mesh) for size in batch_sizes}
    values = {f"{what} {case}": mean[what] for case, mean in means.items() for what in mean}
    references = {f"{what} {case}": reference[what] for case, mean in means.items() for what in mean}
    return _worst("evaluation", 1e-6, values, references)


def evaluate(decoder: Decoder, batch: Batch, size: int, mesh: AnyMesh | None) -> dict[str, float]:
    """Returns loss and accuracy of the rows of `batch` in batches of `size`, the last one filled with padding."""
    graphdef, state = create_state(_copy(decoder), _recorder(decoder), mesh)
    step = make_eval_step(graphdef, mesh)
    filling = empty_batch(-len(batch.tokens) % size, batch.tokens.shape[1], batch.examples.shape[1])
    filled = jax.tree.map(lambda x, y: np.concatenate([x, y]), batch, filling)
    total = weight = correct = 0.0
    for start in range(0, len(filled.tokens), size):
        loss = step(state, jax.tree.map(lambda x, start=start: x[start : start + size], filled))
        sums = (float(np.sum(np.asarray(part), dtype=np.float64)) for part in loss)
        total, weight, correct = map(sum, zip((total, weight, correct), sums, strict=True))
    return {"loss": total / weight, "accuracy": correct / weight}


def step_sums(
    decoder: Decoder, batch: Batch, mesh: AnyMesh | None, loss: LossConfig = LossConfig()
) -> dict[str, np.ndarray]:
    """Returns loss, counts and the mean gradient by path, as a training step computes them for batch [A, B, ...]."""
    graphdef, state = create_state(_copy(decoder), _recorder(decoder), mesh)
    step = make_train_step(graphdef, _recorder(decoder), mesh, loss)
    state, metrics = step(state, place_batch(batch, mesh, batch_dim=1))
    gradient = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {
        "loss": metrics["loss_sum"] / metrics["weight"],
        "weight": metrics["weight"],
        "accuracy": metrics["correct"] / metrics["weight"],
        "supervised tokens": metrics["supervised_tokens"],
        "loss of an example": metrics["per_example_loss"].reshape(-1, batch.examples.shape[-1]),
        **{name: term / metrics["weight"] for name, term in metrics["loss_terms"].items()},
        **{f"gradient of {parameter_path(path)}": np.asarray(g) for path, g in gradient},
    }


def token_losses(decoder: Decoder, batch: Batch, mesh: AnyMesh | None = None) -> np.ndarray:
    """Returns the negative log-likelihood [B, L] of each supervised token, 0 elsewhere."""

    def nll(decoder: Decoder, batch: Batch) -> jax.Array:
        [(hidden, kernel), *added], vocab_axis = _head_products(decoder, batch)
        return cross_entropy(
            hidden, kernel, batch.targets, batch.weights, vocab_axis=vocab_axis, vocab_size=decoder.spec.vocab_size,
            soft_cap=decoder.logit_soft_cap, precision=decoder.options.dot_precision, added=added, mesh=mesh,
        ).nll  # fmt: skip

    return np.asarray(jax.jit(nll)(decoder, place_batch(batch, mesh)))


def _head_products(decoder: Decoder, batch: Batch) -> tuple[list[tuple[jax.Array, jax.Array]], int]:
    return decoder.head_products(decoder.hidden(batch.tokens, batch.positions, batch.segments))


def unpack(batch: Batch, multiple: int = 1) -> tuple[Batch, np.ndarray]:
    """Returns the documents of `batch` one a row [N, L], and for each position the (row, column) it came from.

    N is rounded up to a multiple of `multiple` with rows of padding.

    The second is int [2, N, L], 0 where the row is padding.
    """
    _, length = batch.tokens.shape
    places = [
        (row, np.flatnonzero(batch.segments[row] == segment))
        for row in range(len(batch.tokens))
        for segment in range(1, int(batch.segments[row].max(initial=0)) + 1)
    ]
    rows = -(-len(places) // multiple) * multiple
    alone = empty_batch(rows, length, batch.examples.shape[1])
    source = np.zeros((2, rows, length), np.int64)
    for index, (row, columns) in enumerate(places):
        for name in ("tokens", "targets", "weights", "positions"):
            getattr(alone, name)[index, : len(columns)] = getattr(batch, name)[row, columns]
        alone.segments[index, : len(columns)] = 1
        alone.examples[index, 0] = batch.examples[row, batch.segments[row, columns[0]] - 1]
        source[0, index, : len(columns)], source[1, index, : len(columns)] = row, columns
    return alone, source


def dense_cross_entropy(
    hidden, kernel, targets, weights, vocab_axis: int, soft_cap: float | None, z_loss=0.0, label_smoothing=0.0,
    vocab_size: int | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Returns loss, nll and gradients of `cross_entropy`, from full logits in float64 numpy."""
    h = np.asarray(hidden, np.float64).reshape(-1, hidden.shape[-1])
    w = np.asarray(kernel, np.float64).T if vocab_axis == 0 else np.asarray(kernel, np.float64)
    w = w[:, :vocab_size]
    t, weight = np.asarray(targets).reshape(-1), np.asarray(weights, np.float64).reshape(-1)
    z = h @ w
    slope = 1.0
    if soft_cap is not None:
        z = soft_cap * np.tanh(z / soft_cap)
        slope = 1 - np.square(z / soft_cap)
    rows = np.arange(len(t))
    z_target, z_mean = z[rows, t], z.mean(axis=1)
    z = z - z_target[:, None]
    others = np.where(np.arange(z.shape[1]) == t[:, None], -np.inf, z)
    largest = others.max(axis=1)
    log_odds = largest + np.log(np.exp(others - largest[:, None]).sum(axis=1))  # of all others against the target
    nll = np.logaddexp(0, log_odds)
    log_z = nll + z_target
    d_z = np.exp(z - nll[:, None])
    d_log_z = d_z.copy()
    d_z[rows, t] = -np.exp(log_odds - nll)  # p - 1 without cancellation
    d_z += 2 * z_loss * log_z[:, None] * d_log_z - label_smoothing / z.shape[1]
    d_z[rows, t] += label_smoothing
    d_z *= weight[:, None] * slope
    d_kernel = np.zeros((h.shape[1], kernel.shape[vocab_axis]))
    d_kernel[:, :vocab_size] = h.T @ d_z
    return {
        "loss": np.sum(weight * (nll + z_loss * log_z**2 + label_smoothing * (z_target - z_mean))),
        "nll": np.where(weight != 0, nll, 0).reshape(targets.shape),
        "d hidden": (d_z @ w.T).reshape(hidden.shape),
        "d head": d_kernel.T if vocab_axis == 0 else d_kernel,
    }


def relative_error(value, reference) -> float:
    """Returns max |value - reference| / max |reference|; absolute where the reference is 0."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, (value.shape, reference.shape)
    return float(np.abs(value - reference).max(initial=0) / (np.abs(reference).max(initial=0) or 1.0))


def _worst(contract: str, tolerance: float, values: dict, references: dict) -> Result:
    """Returns the largest relative error; of a gradient that is nothing but rounding, relative to the largest gradient.

    Such is that of a bias of keys without rope, which adds the same to all scores of a query.
    """
    assert values.keys() == references.keys()
    largest = max((np.abs(value).max() for name, value in references.items() if name.startswith("gradient")), default=0.0)

    def error(name: str) -> float:
        size = np.abs(references[name]).max(initial=0)
        rounding = name.startswith("gradient") and size < 1e-5 * largest
        return relative_error(values[name], references[name]) * (size / largest if rounding and size else 1.0)

    errors = {name: error(name) for name in values}
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return Result(contract, name, errors[name], tolerance)


def _further(*results: Result) -> Result:
    return max(results, key=lambda result: math.inf if math.isnan(result.error) else result.error)


def _recorder(decoder: Decoder) -> Optimizer:
    """An optimizer that changes nothing and keeps the gradient it was given as its state."""
    return Optimizer(
        transform=optax.GradientTransformation(
            lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, state, params: (gradient, gradient)
        ),
        schedule=lambda step: jnp.zeros((), jnp.float32),
        clip_norm=0.0,
        seed=0,
        choices=choose_groups(OptimConfig(), nnx.state(decoder)),
    )


def _copy(decoder: Decoder) -> Decoder:
    """The same decoder in arrays of its own, which a step may overwrite."""
    return jax.tree.map(jnp.copy, decoder)
