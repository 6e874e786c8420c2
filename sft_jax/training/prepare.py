"""Preparing data once on a machine with several processes: the first one works, the others read its store."""

from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from sft_jax.config import Config
from sft_jax.data.prepare import PreparedData, prepare
from sft_jax.hf.source import find_model


def prepare_on_all_processes(config: Config, rows: int, log: Callable[[str], None]) -> PreparedData:
    """Returns the prepared data in every process.

    Processes that do not share a cache folder prepare for themselves, after the first. `rows` above 0 is the length
    of the stream; else `train.epochs` decides.
    """
    if jax.process_index() != 0:
        multihost_utils.sync_global_devices("the first process has prepared the data")
    data = prepare(
        config.data, model_path=str(find_model(config.model.path)), seed=config.seed, epochs=config.train.epochs, rows=rows,
        normalize=config.train.normalize, log=log,
    )  # fmt: skip
    if jax.process_index() == 0 and jax.process_count() > 1:
        multihost_utils.sync_global_devices("the first process has prepared the data")
    return data
