"""Evaluation of a model that is not being trained, on the held-out sets of a configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sft_jax.checkpoint.processes import agree
from sft_jax.config import Config, MeshConfig
from sft_jax.data.prepare import HeldOutData, prepare_held_out
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.evals import Between, Evaluator
from sft_jax.evaluation.held_out_rows import Slices, slices_of
from sft_jax.evaluation.results import SetResult
from sft_jax.evaluation.step import make_eval_step, split_model
from sft_jax.hf.load import Progress, load_decoder, load_model_tokenizer, spec_of
from sft_jax.hf.progress import Loading, silently
from sft_jax.hf.restore import model_source
from sft_jax.hf.source import find_model, read_source, tokenizer_folder
from sft_jax.model.decoder import Decoder
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh

Log = Callable[[str], None]
Benchmark = Callable[[Decoder, Tokenizer], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Subject:
    """A model, and where it is from."""

    path: str  # a Hugging Face directory, a hub id, a run or an adapter
    step: int | None = None  # of a run: which checkpoint, None = the newest
    base: str | None = None  # of an adapter that is not where it says


def mesh_for(sizes: MeshConfig, asked: bool, log: Log) -> Mesh:
    """Returns the mesh of a configuration. Where nobody has `asked` for it, since a run recorded it, all devices here will do.

    Raises UserError for a mesh that was asked for and does not fit the devices.
    """
    try:
        return make_mesh(**vars(sizes))
    except UserError as error:
        if asked:
            raise
        log(f"The run's mesh is not for the devices here ({str(error).partition(';')[0]}); all of them lie along mesh.fsdp.")
        return make_mesh(**vars(MeshConfig()))


def open_decoder(subject: Subject, config: Config, mesh: Mesh, progress: Progress | None = None) -> Decoder:
    """Returns the model, to be computed as `config.model` says: what a run with it evaluates."""
    source = agree(lambda: read_source(find_model(subject.path, subject.base), subject.path))
    options = Options(
        compute_dtype=config.model.compute_dtype, precision=config.model.matmul_precision, attention=config.model.attention,
        qat=config.train.qat, exported_as=source.dtype or config.model.dtype, constrain=constrain_fn(mesh),
    )  # fmt: skip
    return load_decoder(subject.path, options, mesh, progress=progress, base=subject.base, step=subject.step)


def open_tokenizer_of(subject: Subject) -> Tokenizer:
    """Returns the tokenizer of a model. Raises UserError where it has none."""
    tokenizer = load_model_tokenizer(subject.path, base=subject.base)
    if tokenizer is None:
        raise UserError(f"{subject.path}: has no tokenizer; put its tokenizer.json or tokenizer.model there.")
    return tokenizer


def open_held_out(subject: Subject, config: Config, log: Log) -> HeldOutData:
    """Returns the held-out sets of `config.data`, prepared for the model; the first process prepares, the others read."""

    def work() -> HeldOutData:
        source = model_source(subject.path) if subject.base is None else read_source(find_model(subject.path, subject.base), subject.path)
        folder = tokenizer_folder(subject.path, subject.base)
        return prepare_held_out(config.data, model_path=str(folder), vocab_size=spec_of(source).vocab_size, log=log)

    first = jax.process_index() == 0
    data = agree(lambda: work() if first else None)
    return agree(lambda: data if first else work())


def evaluate_model(
    subject: Subject,
    config: Config,
    mesh: Mesh,
    *,
    benchmark: Benchmark | None = None,
    log: Log = print,
    loading: Loading = silently,
    progress: Between = lambda what, done, total: None,
) -> "Evaluation":
    """Evaluates a model on every set of `config.data.eval`, as `config.eval` says: answers, scores and slices.

    Args:
        benchmark: is given the model and its tokenizer, and returns further results by name.
        log, loading, progress: take note of what is done.

    Raises UserError for whatever is wrong with model, data or configuration. All processes make the same call.
    """
    data = open_held_out(subject, config, log) if config.data.eval else None
    # before the model is read: a column that is not there is told at once
    parts = slices_of(data.eval, config.data, config.eval.slices, "eval.slices") if data is not None else {}
    rows = config.eval.batch_size or config.train.micro_batch_size or config.train.batch_size
    with loading(subject.path) as loaded:  # its bar is gone before the next one begins
        decoder = open_decoder(subject, config, mesh, loaded)
    results: Mapping[str, SetResult] = {}
    if data is not None:
        graphdef, state = split_model(decoder)
        evaluator = Evaluator(
            config, data, graphdef, make_eval_step(graphdef, mesh), mesh, rows, decoder.source, progress=progress
        )
        results = evaluator.evaluate(state)
    provenance = decoder.source.provenance
    return Evaluation(
        str(Path(subject.path)), provenance.steps if provenance is not None else None, decoder.source.fingerprint,
        data.fingerprint if data is not None else None, results, parts, config.seed,
        benchmark(decoder, open_tokenizer_of(subject)) if benchmark is not None else {},
    )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What was found, and of what."""

    model: str
    steps: int | None  # that the model was trained, where that is known
    model_fingerprint: str | None
    data_fingerprint: str | None
    results: Mapping[str, SetResult]  # by set
    slices: Mapping[str, Slices]  # by set
    seed: int  # of the bootstrap
    benchmarks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # values by task

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values; see `SetResult.describe` for the sets."""
        found = {
            "model": self.model,
            "steps": self.steps,
            "model_fingerprint": self.model_fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "sets": {name: result.describe(self.slices.get(name), self.seed) for name, result in self.results.items()},
        }
        return {**found, "benchmarks": dict(self.benchmarks)} if self.benchmarks else found

    def records(self) -> list[dict[str, Any]]:
        """Returns a record for each answer, in the order of the data, so that the answers of two models can be compared by line."""
        return [{"set": name, **record} for name, result in self.results.items() for record in result.records]
