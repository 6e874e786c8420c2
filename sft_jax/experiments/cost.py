"""What runs cost, and that they can begin at all, before the first one does: their data are prepared and their models composed."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sft_jax.config import Config, to_dict
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.experiments.runs import Run
from sft_jax.hf.restore import model_source
from sft_jax.model.sharding import make_mesh
from sft_jax.training.composition import Composition, compose
from sft_jax.training.placement import check_length, check_rows
from sft_jax.training.prepare import prepare_on_all_processes
from sft_jax.training.resolved import resolved


@dataclass(frozen=True)
class Cost:
    """How much a run has to do."""

    steps: int
    tokens: int  # real ones, in all of its steps
    rows: dict[str, int]  # of the files of each training set, each once


def costs_of(runs: Sequence[Run], log: Callable[[str], None]) -> list[Cost]:
    """Returns the cost of each run. Of runs that differ in their seed only it is that of the first.

    Raises UserError for data that cannot be used and for settings that the model or the optimizer refuses.
    """
    measured: dict[str, Cost] = {}
    checked: set[str] = set()
    found = []
    for run in runs:
        config = resolved(run.config)
        point, data = _key(config, "seed"), _key(config, "seed", "optim", "log", "loss", "eval", "checkpoint")
        if point not in checked:
            composed = _compose(config, log)
            if data not in measured:
                measured[data] = _measure(config, composed.abstract.spec.vocab_size, log)
            composed.optimizer(measured[data].steps)  # raises where warm-up and decay do not fit
            checked.add(point)
        found.append(measured[data])
    return found


def _key(config: Config, *without: str) -> str:
    """Returns a text that is the same for configurations that differ in nothing but the sections `without`."""
    return json.dumps({key: value for key, value in to_dict(config).items() if key not in without}, sort_keys=True)


def _compose(config: Config, log: Callable[[str], None]) -> Composition:
    mesh = make_mesh(**vars(config.mesh))
    micro_rows = config.train.micro_batch_size or config.train.batch_size
    check_length(mesh, config.data.max_length)
    check_rows(mesh, micro_rows, "train.micro_batch_size")
    check_rows(mesh, config.eval.batch_size or micro_rows, "eval.batch_size")
    return compose(config, model_source(config.model.path), mesh, log)


def _measure(config: Config, vocab_size: int, log: Callable[[str], None]) -> Cost:
    rows = config.train.steps * config.train.batch_size
    stream = prepare_on_all_processes(config, rows, vocab_size, None, log).train
    return Cost(
        math.ceil(stream.total_rows / config.train.batch_size), stream.real_tokens,
        {name: len(numbers) for name, numbers in used_rows(stream).items()},
    )  # fmt: skip


def used_rows(stream: RowStream) -> dict[str, np.ndarray]:
    """Returns the numbers of the rows of each set that a stream has documents of, in rising order."""
    corpus, example = stream.corpus, stream.documents.example
    found = {}
    for index, (name, store) in enumerate(zip(corpus.names, corpus.stores, strict=True)):
        first, end = corpus.bases[index : index + 2]
        own = example[(example >= first) & (example < end)] - first
        found[name] = np.unique(store.rows.whole()[own])
    return found
