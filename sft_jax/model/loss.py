"""The loss of a decoder on a batch, as sums.

Letters: B rows, L length, S segments in a row, D hidden size, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sft_jax.batch import Batch
from sft_jax.model.cross_entropy import cross_entropy
from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import AnyMesh


class LossSum(NamedTuple):
    """Sums, never means: adding two of them gives the loss of the union. The mean loss is `nll / weight`.

    Only `total` carries a gradient.
    """

    total: jax.Array  # fp32 [], what is minimised: the sum of nll and terms
    nll: jax.Array  # fp32 [], sum of weight * negative log-likelihood, in nats
    weight: jax.Array  # fp32 [], sum of weights
    correct: jax.Array  # fp32 [], sum of weights where the target is the argmax: accuracy is correct / weight
    count: jax.Array  # int32 [], supervised positions
    per_example: jax.Array  # fp32 [B, S], sum of weight * nll over segment s + 1 of the row
    per_example_weight: jax.Array  # fp32 [B, S]
    per_example_correct: jax.Array  # fp32 [B, S]
    terms: dict[str, jax.Array]  # fp32 [], sum of weight * each further term of a training loss, by its name
    expert_load: jax.Array | None  # fp32 [layers of experts, E], choices by real tokens; of training only


def segment_sums(values: jax.Array, segments: jax.Array, count: int) -> jax.Array:
    """Returns [B, count], the sum of `values` [B, L] over the positions of segment 1, 2, ..., count of each row."""
    of_segment = segments[:, :, None] == jnp.arange(1, count + 1, dtype=segments.dtype)
    return jnp.sum(jnp.where(of_segment, values[:, :, None], 0), axis=1)


def next_token_loss(
    decoder: Decoder,
    batch: Batch,
    mesh: AnyMesh | None = None,
    key: jax.Array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    router_balance: float = 0.0,
    router_z: float = 0.0,
    route: bool = False,
) -> LossSum:
    """Returns the sums of the loss of `decoder` on `batch` [B, L]; `targets` hold the next tokens already.

    `key` is the randomness of a training call; without it, as in evaluation, nothing is random. `z_loss` and
    `label_smoothing` are the terms of `cross_entropy`. With `route` a model of experts also gives the load of its experts
    and, as terms, the mean balance and z of its routers (`sft_jax.model.experts.Routed`), which count in the total
    `router_balance` and `router_z` times. A document's routing weighs as much as its supervised tokens.
    """
    read = decoder.hidden_and_routed if route else lambda *inputs: (decoder.hidden(*inputs), None)
    hidden, routed = read(batch.tokens, batch.positions, batch.segments, key)
    [(hidden, kernel), *added], vocab_axis = decoder.head_products(hidden, key)
    loss = cross_entropy(
        hidden,
        kernel,
        batch.targets,
        batch.weights,
        vocab_axis=vocab_axis,
        vocab_size=decoder.spec.vocab_size,
        soft_cap=decoder.logit_soft_cap,
        precision=decoder.options.dot_precision,
        mesh=mesh,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        added=added,
    )
    per_segment = partial(segment_sums, segments=batch.segments, count=batch.examples.shape[1])
    total = loss.total
    terms = {name: jnp.sum(batch.weights * term) for name, term in loss.terms.items()}
    if routed is not None:
        weights = _document_weights(batch)
        terms |= {"router_balance": jnp.sum(weights * routed.balance), "router_z": jnp.sum(weights * routed.z)}
        total = total + router_balance * terms["router_balance"] + router_z * terms["router_z"]
    return LossSum(
        total=total,
        nll=jnp.sum(batch.weights * loss.nll),
        weight=jnp.sum(batch.weights),
        correct=jnp.sum(jnp.where(loss.hit, batch.weights, 0)),
        count=jnp.sum(batch.weights != 0, dtype=jnp.int32),
        per_example=per_segment(batch.weights * loss.nll),
        per_example_weight=per_segment(batch.weights),
        per_example_correct=per_segment(jnp.where(loss.hit, batch.weights, 0)),
        terms=terms,
        expert_load=None if routed is None else routed.load,
    )


def _document_weights(batch: Batch) -> jax.Array:
    """Returns [B, L]: the weight of a token's document, spread evenly over its tokens; 0 for padding."""
    count = batch.examples.shape[1]
    tokens = segment_sums(jnp.ones_like(batch.weights), batch.segments, count)
    shares = segment_sums(batch.weights, batch.segments, count) / jnp.maximum(tokens, 1.0)
    of_token = jnp.take_along_axis(shares, jnp.maximum(batch.segments - 1, 0), axis=1)
    return jnp.where(batch.segments > 0, of_token, 0.0)
