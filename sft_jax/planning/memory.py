"""Bytes of each device by what they are for."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from sft_jax.batch import Batch
from sft_jax.model.cross_entropy import chunk_rows
from sft_jax.planning.program import Programs, bytes_per_device, trained_bytes_fp32


@dataclass(frozen=True)
class Held:
    """Bytes of each device that follow from shapes and shardings alone."""

    trained: int
    frozen: int
    optimizer: int
    average: int
    batch: int
    gradients: int  # one float32 copy; each accumulated one takes a second
    logits: int  # float32, of one chunk of positions

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.trained + self.frozen + self.optimizer + self.average

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def held(programs: Programs) -> Held:
    """Returns the bytes of each device that need no compiler to be known."""
    state = programs.state
    positions, vocab = loss_shape(programs, programs.batch)
    return Held(
        trained=bytes_per_device(state.params), frozen=bytes_per_device(state.frozen), optimizer=bytes_per_device(state.opt_state),
        average=bytes_per_device(state.average), batch=bytes_per_device(programs.batch), gradients=trained_bytes_fp32(state),
        logits=4 * chunk_rows(positions, vocab) * vocab,
    )  # fmt: skip


def loss_shape(programs: Programs, batch: Batch) -> tuple[int, int]:
    """Returns the positions of a micro-batch, or of the rows of an evaluation, and the columns of the head of which a device computes
    the loss; `batch` is one of the two that `programs` has."""
    tokens = batch.tokens
    positions = int(np.prod(tokens.sharding.shard_shape(tokens.shape)[-2:])) // programs.mesh.shape["context"]
    rows = programs.composed.abstract.spec.vocab_rows
    embedding = programs.composed.abstract.embed.embedding
    sharding = embedding.get_value().sharding
    pieces = rows // sharding.shard_shape(embedding.get_value().shape)[0] if isinstance(sharding, NamedSharding) else 1
    return positions, rows // pieces
