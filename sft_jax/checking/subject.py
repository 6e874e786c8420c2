"""What is checked: the user's model, a batch of the user's rows, and the user's mesh.

The arithmetic is float32 at highest precision and without dropout or noise, whatever the run computes in: the contracts are
about what is computed, and rounding would hide that. Parameters keep the dtype of the run, kernels and remat are its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sft_jax.batch import Batch
from sft_jax.config import Config
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.prepare import PreparedData
from sft_jax.errors import UserError
from sft_jax.hf.load import load_decoder
from sft_jax.hf.merged import plain
from sft_jax.hf.restore import model_source
from sft_jax.model.adapters import is_adapter
from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import make_mesh, pieces_along
from sft_jax.training.adapting import with_new_adapters
from sft_jax.training.composition import Composition, compose
from sft_jax.training.placement import check_length
from sft_jax.training.prepare import prepare_on_all_processes
from sft_jax.training.replication import check_replication
from sft_jax.training.resolved import resolved
from sft_jax.training.state import abstract_state

_LOOKED_AT = 64  # rows among which those with the most documents are taken

Log = Callable[[str], None]


@dataclass
class Subject:
    """The model of `run`, computed exactly, and rows to compute on."""

    run: Config  # as it was given
    config: Config  # as it is checked
    mesh: Mesh
    composed: Composition  # of `config`
    data: PreparedData
    batch: Batch  # [B, L], B = twice the parts in which the mesh cuts rows

    @functools.cached_property
    def base(self) -> Decoder:
        """The model that the run begins with, without new adapters, on the mesh."""
        return self._load(self.mesh, self.composed)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The same with the adapters of the run, where it trains some."""
        return with_new_adapters(self.base, self.config, self.composed.adapters)

    @functools.cached_property
    def alone(self) -> Decoder:
        """`decoder` on one device: the base is read for it once more, adapters are those of `decoder`."""
        composed = compose(self.config, self.composed.source, one_device(), log=_silent)
        decoder = with_new_adapters(self._load(None, composed), self.config, composed.adapters)
        graphdef, state = nnx.split(decoder)
        values = dict(nnx.to_flat_state(nnx.state(self.decoder)))
        flat = [(path, values[path] if is_adapter(".".join(map(str, path))) else own) for path, own in nnx.to_flat_state(state)]
        return nnx.merge(graphdef, jax.device_put(nnx.from_flat_state(flat), jax.devices()[0]))

    def _load(self, mesh: Mesh | None, composed: Composition) -> Decoder:
        model = self.config.model
        decoder = load_decoder(
            model.path, composed.options, mesh, model.dtype, init=model.init, seed=self.config.seed,
            vocab_size=composed.abstract.spec.vocab_size, stored_as=self.config.adapter.base_dtype,
        )  # fmt: skip
        return plain(decoder)

    @property
    def rows_at_once(self) -> int:
        """The parts in which the mesh cuts the rows of a batch."""
        return pieces_along(self.mesh, "batch")

    @property
    def documents(self) -> int:
        """The documents of the row that has the most."""
        return int(self.batch.segments.max(initial=0))


def one_device() -> Mesh:
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def open_subject(config: Config, log: Log) -> Subject:
    """Prepares the data of a run and composes its model; loads nothing yet.

    Raises UserError for all that training would refuse before its first step, and in a run of several processes.
    """
    if jax.process_count() > 1:
        raise UserError("selfcheck: runs in one process; start it on one host, with a mesh of the devices there.")
    run = resolved(config)
    exact = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, compute_dtype="float32", matmul_precision="highest"),
        adapter=dataclasses.replace(run.adapter, dropout=0.0),
        train=dataclasses.replace(run.train, neftune=0.0),
    )
    mesh = make_mesh(**vars(exact.mesh))
    check_length(mesh, exact.data.max_length)
    composed = compose(exact, model_source(exact.model.path), mesh, log=log)
    _, like = abstract_state(composed.abstract, composed.optimizer(1), mesh)
    check_replication(like, mesh, exact.train.max_replicated)
    data = prepare_on_all_processes(exact, 0, composed.abstract.spec.vocab_size, None, log=log)
    rows = 2 * pieces_along(mesh, "batch")
    return Subject(run, exact, mesh, composed, data, fullest_rows(data.train, rows))


def fullest_rows(stream: RowStream, count: int) -> Batch:
    """Returns [count, L] rows, of the first ones those with the most documents that teach something; padding where there are fewer."""
    batch = stream.read(0, max(count, min(_LOOKED_AT, stream.total_rows)))
    documents = batch.segments.max(axis=1) * (batch.weights != 0).any(axis=1)
    chosen = np.sort(np.argsort(-documents, kind="stable")[:count])
    return Batch(*(field[chosen] for field in batch))


def _silent(message: str) -> None:
    """What composing says was said when the run's mesh was composed for."""
