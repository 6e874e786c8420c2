"""What training changes: one pytree, made in its shardings."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sft_jax.checkpoint.checkpoints import flatten_state
from sft_jax.model.adapters import AdapterPlan, is_adapter
from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import AnyMesh, shardings
from sft_jax.training.optim import Optimizer


class TrainState(NamedTuple):
    """Everything a step reads and writes. `nnx.merge(graphdef, state.params, state.frozen)` is the decoder."""

    step: jax.Array  # int32 [], updates made so far; a step that is skipped does not count
    params: nnx.State  # trained parameters
    frozen: nnx.State  # what groups froze, or the base of adapters: no gradient, no optimizer state
    opt_state: Any
    average: nnx.State  # of params over the updates, fp32; empty where none is kept (optim.ema)

    @property
    def averaged(self) -> "TrainState":
        """The state that is evaluated and exported: with the average, where one is kept, as its parameters."""
        return self._replace(params=self.average, average=nnx.State({})) if self.average else self


def create_state(
    decoder: Decoder, optimizer: Optimizer, mesh: AnyMesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the static part of the decoder and a new state with its arrays, laid out on `mesh`.

    The arrays are the decoder's own where they already lie as `mesh` wants them: the first step, which is given the
    state to overwrite, ends the use of `decoder`. Optimizer state is made in its shards.
    """
    graphdef, params, frozen = nnx.split(decoder, optimizer.trainable, ...)
    step = jnp.zeros((), jnp.int32)
    out_shardings = None
    if mesh is not None:
        step, params, frozen = jax.device_put((step, params, frozen), shardings((step, params, frozen), mesh))
        out_shardings = shardings(jax.eval_shape(partial(_beside, optimizer), params), mesh)
    beside = jax.jit(partial(_beside, optimizer), out_shardings=out_shardings)(params)
    return graphdef, TrainState(step, params, frozen, *beside)


def abstract_state(
    decoder: Decoder, optimizer: Optimizer, mesh: AnyMesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns what `create_state` would, with a ShapeDtypeStruct and its sharding for each array.

    `decoder` may itself be abstract. This is the target of a restore, and what the step is compiled for ahead of time.
    """
    graphdef, params, frozen = nnx.split(decoder, optimizer.trainable, ...)
    beside = jax.eval_shape(partial(_beside, optimizer), params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, frozen, *beside)
    placed = jax.tree.map(lambda _: None, state) if mesh is None else shardings(state, mesh)

    def describe(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return graphdef, jax.tree.map(describe, state, placed, is_leaf=lambda node: node is None)


def saved_arrays(state: TrainState, adapters: AdapterPlan | None) -> dict[str, Any]:
    """Returns what a checkpoint holds, by path: all of the state, but with adapters not the base, which lies in its own files."""
    arrays = flatten_state(state)
    return arrays if adapters is None else {name: x for name, x in arrays.items() if not _of_base(name, adapters)}


def base_arrays(state: TrainState, base: Decoder, adapters: AdapterPlan) -> dict[str, jax.Array]:
    """Returns the arrays that `saved_arrays` leaves out of a state, concrete or abstract, as they are in `base`."""
    arrays = flatten_state({"frozen": nnx.state(base)})
    return {name: arrays[name] for name in flatten_state(state) if _of_base(name, adapters)}


def _of_base(name: str, adapters: AdapterPlan) -> bool:
    """Returns whether an array of a state is the base's own, and not of an adapter that a group froze."""
    part, _, path = name.replace("/", ".").partition(".")
    return part == "frozen" and not is_adapter(path) and path not in adapters.trained


def _beside(optimizer: Optimizer, params: nnx.State) -> tuple[Any, nnx.State]:
    """Returns what a new state has for its trainable parameters: optimizer state and average."""
    return optimizer.init(params), optimizer.init_average(params)
