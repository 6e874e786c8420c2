"""Contracts of what a step computes: two ways that must give the same, on the user's model and rows."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sft_jax.batch import Batch
from sft_jax.checking.outcome import Outcome
from sft_jax.checking.subject import Subject
from sft_jax.model.adapters import is_adapter
from sft_jax.model.attach import merge
from sft_jax.model.decoder import Decoder
from sft_jax.training import contracts
from sft_jax.training.contracts import Result

_LOGITS = 1 << 30  # bytes of logits in float32 that a check may look at
_SHORTEST = 128  # tokens of a row that no check goes below: kernels read whole blocks
_ROOM = 10  # tolerances are for small models; a large one adds up more numbers, and a fault is larger by far
_NO_ADAPTERS = "the run trains no adapters"
_ONE_DOCUMENT = "no row holds two documents (data.packing is off, or rows are as short as documents)"


def accumulation(subject: Subject) -> Outcome:
    """Two micro-batches give the loss, the counts and the gradient of one batch."""
    return _outcome(contracts.accumulation(subject.decoder, subject.batch, 2, subject.mesh, subject.config.loss))


def packing(subject: Subject) -> Outcome:
    """Packed rows give the loss of every token and the gradient of one document a row."""
    if subject.documents < 2:
        return Outcome("packing", not_checked=_ONE_DOCUMENT)
    return _outcome(contracts.packing(subject.decoder, subject.batch, subject.config.loss, subject.mesh))


def isolation(subject: Subject) -> Outcome:
    """Changing the tokens of a document leaves the logits of its neighbours in the row as they were, bit for bit."""
    batch = shortened(subject.batch, subject.decoder.spec.vocab_size)
    if batch.segments.max() < 2:
        return Outcome("isolation", not_checked=_ONE_DOCUMENT)
    return _outcome(contracts.isolation(subject.decoder, batch))


def layout(subject: Subject) -> Outcome:
    """The mesh gives the loss, the counts and the gradient that one device gives."""
    if subject.mesh.size == 1:
        return Outcome("layout", not_checked="the mesh has one device")
    builds = {True: subject.alone, False: subject.decoder}
    try:
        result = contracts.layout(lambda mesh: builds[mesh is None], subject.batch, {"mesh": subject.mesh}, subject.config.loss)["mesh"]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Outcome("layout", not_checked="one device cannot hold the model in float32 with its gradient")
    return _outcome(result)


def chunking(subject: Subject) -> Outcome:
    """The loss made in chunks, and its gradients, are those of full logits in float64."""
    batch = shortened(subject.batch, subject.decoder.spec.vocab_size, share=0.25)  # in float64, several times
    positions = batch.tokens.size // subject.rows_at_once
    return _outcome(contracts.chunking(subject.decoder, batch, max(1, positions // 3), subject.mesh, subject.config.loss))


def evaluation(subject: Subject) -> Outcome:
    """The loss of held-out rows depends on neither the rows of a batch nor packing."""
    at_once, batch = subject.rows_at_once, subject.batch
    alone, _ = contracts.unpack(batch, at_once)
    whole, *others = (
        contracts.evaluate(subject.decoder, rows, size, subject.mesh)["loss"]
        for rows, size in ((batch, len(batch.tokens)), (batch, at_once), (alone, at_once))
    )
    error, quantity = max((contracts.relative_error(loss, whole), name) for loss, name in zip(others, ("loss in smaller batches", "loss of one document a row"), strict=True))
    return Outcome("evaluation", quantity, error, _ROOM * 1e-6)


def adapters(subject: Subject) -> Outcome:
    """New adapters leave the logits of the base as they are: bit for bit, or up to rounding where columns have magnitudes."""
    if subject.composed.adapters is None:
        return Outcome("adapters", not_checked=_NO_ADAPTERS)
    if subject.config.adapter.path:
        return Outcome("adapters", not_checked="the run goes on with an adapter that has moved already")
    batch = shortened(subject.batch, subject.decoder.spec.vocab_size)
    new, base = _logits(subject.decoder, batch), _logits(subject.base, batch)
    if any(module.magnitude for module in subject.composed.adapters.modules):
        return Outcome("adapters", "logits", contracts.relative_error(new, base), 1e-5)
    return Outcome("adapters", "logits that new adapters changed", float(np.sum(new != base)), 0.0)


def merging(subject: Subject) -> Outcome:
    """Adapters that have moved give the same logits merged into their kernels."""
    if subject.composed.adapters is None:
        return Outcome("merging", not_checked=_NO_ADAPTERS)
    if subject.config.adapter.base_dtype or subject.config.model.dtype != "float32":
        return Outcome("merging", not_checked="merging rounds to the dtype of the base; the contract is about float32")
    batch = shortened(subject.batch, subject.decoder.spec.vocab_size)
    moved = _moved(subject.decoder, subject.config.seed)
    attached, merged = _logits(moved, batch), _logits(merge(moved), batch)
    return Outcome("merging", "logits", contracts.relative_error(merged, attached), 1e-5)


def shortened(batch: Batch, vocab_size: int, share: float = 1.0) -> Batch:
    """Returns rows cut to a length, a half, a quarter, ... of theirs, at which their logits take `share` of what they may."""
    length = batch.tokens.shape[1]
    while length % 2 == 0 and length // 2 >= _SHORTEST and len(batch.tokens) * length * vocab_size * 4 > share * _LOGITS:
        length //= 2
    return Batch(*(field[:, :length] for field in batch[:-1]), batch.examples)


def _logits(decoder: Decoder, batch: Batch) -> np.ndarray:
    return np.asarray(jax.jit(lambda d: d(batch.tokens, batch.positions, batch.segments))(decoder))


def _moved(decoder: Decoder, seed: int) -> Decoder:
    """Returns the decoder with noise on its adapters, of the size of their own numbers, or a hundredth where those are zero."""
    graphdef, state = nnx.split(decoder)
    flat = []
    for number, (path, variable) in enumerate(nnx.to_flat_state(state)):
        if is_adapter(".".join(map(str, path))):
            value = variable.get_value()
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), value.shape, value.dtype)
            scale = jnp.where(jnp.any(value != 0), jnp.std(value), 1.0) * 0.01
            variable = variable.replace(value + scale * noise)  # the decoder's own stays as it is
        flat.append((path, variable))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _outcome(result: Result) -> Outcome:
    return Outcome(result.contract, result.quantity, result.error, _ROOM * result.tolerance)
