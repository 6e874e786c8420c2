"""What training changes: one pytree, made in its shardings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import AnyMesh, shardings
from sft_jax.training.optim import Optimizer


class TrainState(NamedTuple):
    """Everything a step reads and writes. `nnx.merge(graphdef, state.params, state.frozen)` is the decoder."""

    step: jax.Array  # int32 [], updates made so far; a step that is skipped does not count
    params: nnx.State  # trained parameters
    frozen: nnx.State  # parameters that the groups froze: no gradient, no optimizer state
    opt_state: Any


def create_state(
    decoder: Decoder, optimizer: Optimizer, mesh: AnyMesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the static part of the decoder and a new state with its arrays, laid out on `mesh`.

    The arrays are the decoder's own where they already lie as `mesh` wants them: the first step, which is given the
    state to overwrite, ends the use of `decoder`. Optimizer state is made in its shards.
    """
    graphdef, params, frozen = nnx.split(decoder, optimizer.trainable, ...)
    step = jnp.zeros((), jnp.int32)
    if mesh is None:
        return graphdef, TrainState(step, params, frozen, jax.jit(optimizer.init)(params))
    step, params, frozen = jax.device_put((step, params, frozen), shardings((step, params, frozen), mesh))
    out_shardings = shardings(jax.eval_shape(optimizer.init, params), mesh)
    return graphdef, TrainState(step, params, frozen, jax.jit(optimizer.init, out_shardings=out_shardings)(params))


def abstract_state(
    decoder: Decoder, optimizer: Optimizer, mesh: AnyMesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns what `create_state` would, with a ShapeDtypeStruct and its sharding for each array.

    `decoder` may itself be abstract. This is the target of a restore, and what the step is compiled for ahead of time.
    """
    graphdef, params, frozen = nnx.split(decoder, optimizer.trainable, ...)
    opt_state = jax.eval_shape(optimizer.init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, frozen, opt_state)
    placed = jax.tree.map(lambda _: None, state) if mesh is None else shardings(state, mesh)

    def describe(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return graphdef, jax.tree.map(describe, state, placed, is_leaf=lambda node: node is None)
