"""The training step: a pure function of state and batch, compiled once.

Accumulation adds gradients of sums and weights, and divides once, by the weight of all micro-batches on all devices: k
micro-batches give the gradient of one batch however unevenly they are supervised.

Letters: A micro-batches, B rows of one, L length, S segments in a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.batch import Batch
from sft_jax.config import LossConfig
from sft_jax.evaluation.step import gather_documents, replicate
from sft_jax.model.loss import LossSum, next_token_loss
from sft_jax.model.sharding import AnyMesh, batch_sharding, shardings
from sft_jax.training.optim import Optimizer, StepNumbers
from sft_jax.training.state import TrainState

Metrics = dict[str, jax.Array | dict[str, jax.Array]]


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: Optimizer, mesh: AnyMesh | None = None, loss: LossConfig = LossConfig(), per_example: bool = True
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted step (state, Batch [A, B, ...]) -> (state, metrics); the state that goes in is overwritten.

    A step whose loss or gradient is not finite, or that has no supervised token, leaves the whole state as it was, bit
    for bit, `step` included. Randomness depends on `optimizer.seed`, `step` and the number of the micro-batch only.
    `numbers`, where they are given, take the place of the optimizer's own, so that runs which differ in them alone are one
    compiled program: (state, batch, StepNumbers). Nothing waits for the host: metrics are device arrays, the same on every process,

        loss_sum            fp32, sum of weight * nll; loss_sum / weight is the loss
        loss_terms          name -> fp32, sum of weight * each term that `loss` adds to nll; of a model of experts also
                            "router_balance" and "router_z", whatever they count in the loss
        expert_load_peak    fp32, of a model of experts only: choices of the busiest expert of any layer, 1 = as many as
                            each has where all have as many
        weight              fp32, sum of weights
        correct             fp32, sum of weights where the target is the argmax
        supervised_tokens   int32, positions with weight
        real_tokens         int32, positions that are no padding
        grad_norm           fp32, of the mean gradient over all trained parameters, before clipping
        learning_rate       fp32, that this update used or would have used
        nonfinite, empty    int32, 1 where the update was left out for that reason
        per_example_loss, per_example_weight, per_example_correct   with `per_example` only: fp32 [A, B, S], what adds up to
                            loss_sum, weight and correct, of each segment; with NEFTune and dropout as noisy as the loss is
    """

    def loss_sum(params: nnx.State, frozen: nnx.State, batch: Batch, key: jax.Array) -> tuple[jax.Array, LossSum]:
        decoder = nnx.merge(graphdef, params, frozen)
        sums = next_token_loss(decoder, batch, mesh, key, **vars(loss), route=True)
        return sums.total, sums

    def train_step(state: TrainState, batch: Batch, numbers: StepNumbers | None = None) -> tuple[TrainState, Metrics]:
        own = optimizer if numbers is None else optimizer.given(numbers)
        key = jax.random.fold_in(own.key, state.step)
        gradient, losses = _accumulate(jax.grad(loss_sum, has_aux=True), state, batch, key, mesh)
        total, weight = jnp.sum(losses.total), jnp.sum(losses.weight)
        divisor = jnp.where(weight > 0, weight, 1.0)
        with jax.named_scope("optimizer"):
            grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient))) / divisor
        clip = jnp.minimum(1.0, own.clip_norm / grad_norm) if own.clip_norm else 1.0
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

        def update(params, opt_state, average):
            mean = jax.tree.map(lambda g: g * (clip / divisor), gradient)
            params, opt_state = own.update(mean, opt_state, params, state.step)
            return state.step + 1, params, opt_state, own.update_average(average, params, state.step)

        def keep(*old):
            return state.step, *old

        # A branch, not a select of new and old values, for which XLA copies the moments on the CPU.
        old = state.params, state.opt_state, state.average
        with jax.named_scope("optimizer"):
            step, params, opt_state, average = jax.lax.cond(finite & (weight > 0), update, keep, *old)
        metrics = {
            "loss_sum": jnp.sum(losses.nll),
            "loss_terms": jax.tree.map(jnp.sum, losses.terms),
            "weight": weight,
            "correct": jnp.sum(losses.correct),
            "supervised_tokens": jnp.sum(losses.count),
            "real_tokens": jnp.sum(batch.segments > 0, dtype=jnp.int32),
            "grad_norm": grad_norm,
            "learning_rate": own.schedule(state.step),
            "nonfinite": (~finite).astype(jnp.int32),
            "empty": (weight == 0).astype(jnp.int32),
        }
        if per_example:
            sums = gather_documents(losses, mesh)
            metrics |= {"per_example_loss": sums.nll, "per_example_weight": sums.weight, "per_example_correct": sums.correct}
        if losses.expert_load is not None:
            load = jnp.sum(losses.expert_load, axis=0)
            metrics["expert_load_peak"] = jnp.max(load / jnp.maximum(load.mean(axis=1, keepdims=True), 1.0))
        state = TrainState(step, params, state.frozen, opt_state, average)
        return _keep_layout(state, mesh), replicate(metrics, mesh)

    return jax.jit(train_step, donate_argnums=0)


def place_batch(batch: Batch, mesh: AnyMesh | None, batch_dim: int = 0) -> Batch:
    """Returns `batch` on the devices, split along `batch_dim`, the dimension of rows: 0, or 1 behind micro-batches."""
    return jax.device_put(batch, None if mesh is None else batch_sharding(mesh, batch_dim))


def _accumulate(
    grad_fn, state: TrainState, batch: Batch, key: jax.Array, mesh: AnyMesh | None
) -> tuple[nnx.State, LossSum]:
    """Returns the fp32 sum of the gradients of all micro-batches and their losses, stacked [A, ...]."""
    count = batch.tokens.shape[0]

    @jax.jit  # so that the shapes of its losses, which are asked for first, cost no second trace
    def micro_step(total: nnx.State | None, number: jax.Array, micro: Batch) -> tuple[nnx.State, LossSum]:
        gradient, loss = grad_fn(state.params, state.frozen, micro, jax.random.fold_in(key, number))
        gradient = _keep_layout(jax.tree.map(lambda g: g.astype(jnp.float32), gradient), mesh)
        if mesh is not None and mesh.size > 1:
            # Without it XLA tries to move the all-reduces of this loop behind it and, for TPUs, fails to compile the step
            # (RET_CHECK in while_loop_all_reduce_code_motion.cc, libtpu 0.0.42).
            gradient = jax.lax.optimization_barrier(gradient)
        return gradient if total is None else jax.tree.map(jnp.add, total, gradient), loss

    def numbered(number: jax.Array | int) -> Batch:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), batch)

    if count == 1:
        gradient, loss = micro_step(None, jnp.int32(0), numbered(0))
        return gradient, jax.tree.map(lambda x: x[None], loss)

    def add(number: jax.Array, sums: tuple[nnx.State, LossSum]) -> tuple[nnx.State, LossSum]:
        total, loss = micro_step(sums[0], number, numbered(number))
        return total, jax.tree.map(lambda all, one: all.at[number].set(one), sums[1], loss)

    zeros = _keep_layout(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params), mesh)
    shapes = jax.eval_shape(micro_step, zeros, jnp.int32(0), numbered(0))[1]
    losses = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
    # How often it runs is hidden from the compiler. libtpu takes a loop of known length for one to pipeline, with the launchers'
    # flags: it peels micro-batches off and keeps the gathered head, kernels and states of two of them, gigabytes for nothing.
    with jax.named_scope("accumulation"):
        return jax.lax.fori_loop(jnp.int32(0), jax.lax.optimization_barrier(jnp.int32(count)), add, (zeros, losses))


def _keep_layout(tree, mesh: AnyMesh | None):
    """Pins every array where its parameter's metadata wants it, so that a step gives back the layout it was given."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))
