"""The evaluation step: a pure function of state and batch, compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.batch import Batch
from sft_jax.model.decoder import Decoder
from sft_jax.model.loss import LossSum, next_token_loss
from sft_jax.model.sharding import AnyMesh

DOCUMENTS = "sums_of_documents"  # how compiled programs name what gather_documents gathers


class DocumentLoss(NamedTuple):
    """Sums over each document of each row, float32 [B, S]: adding them gives the sums of any set of documents."""

    nll: jax.Array  # weight * negative log-likelihood, in nats
    weight: jax.Array
    correct: jax.Array  # weight where the target is the argmax


EvalStep = Callable[[Any, Batch], DocumentLoss]  # (state, Batch [B, L]) -> sums, whole on every process


class State(Protocol):
    """The part of a train state that is evaluated: `nnx.merge(graphdef, state.params, state.frozen)` is the decoder."""

    params: nnx.State
    frozen: nnx.State


class ModelState(NamedTuple):
    """The state of a model that is not trained."""

    params: nnx.State
    frozen: nnx.State = nnx.State({})


def split_model(decoder: Decoder) -> tuple[nnx.GraphDef, ModelState]:
    """Returns the static part of a decoder, and its parameters as a state."""
    graphdef, params = nnx.split(decoder)
    return graphdef, ModelState(params)


def make_eval_step(graphdef: nnx.GraphDef, mesh: AnyMesh | None = None) -> EvalStep:
    """Returns the jitted (state, Batch [B, ...]) -> DocumentLoss; sums, so that batches of any size add up to one result."""

    def eval_step(state: State, batch: Batch) -> DocumentLoss:
        return gather_documents(next_token_loss(nnx.merge(graphdef, state.params, state.frozen), batch, mesh), mesh)

    return jax.jit(eval_step)


def gather_documents(sums: LossSum, mesh: AnyMesh | None) -> DocumentLoss:
    """Returns the sums over documents, leading dimensions as they are, whole on every device of `mesh`; under a jit.

    The three are gathered as one array. Weights alone depend on no layer, so devices of a CPU, which order what is independent
    each for itself, would wait for each other in different collectives.
    """
    with jax.named_scope(DOCUMENTS):
        stacked = jnp.stack([sums.per_example, sums.per_example_weight, sums.per_example_correct])
        return DocumentLoss(*replicate(stacked, mesh))


def replicate(tree, mesh: AnyMesh | None):
    """Returns arrays under a jit whole on every device, so that every process can read them."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))
