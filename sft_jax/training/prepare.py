"""Preparing data on several processes: the first one works, the others read its store, and all have the same rows."""

import datetime
from collections.abc import Callable

import jax

from sft_jax.checkpoint.processes import agree, of_first_process
from sft_jax.config import Config
from sft_jax.data.prepare import PreparedData, day_of, prepare
from sft_jax.training.adapting import tokenizer_place
from sft_jax.training.agreement import check_same


def prepare_on_all_processes(
    config: Config, rows: int, vocab_size: int, rendered_at: str | None, log: Callable[[str], None]
) -> PreparedData:
    """Returns the prepared data in every process.

    Processes that do not share a cache folder prepare for themselves, after the first.

    Args:
        rows: above 0, the length of the stream; else `train.epochs` decides.
        vocab_size: of the model.
        rendered_at: the day on which the run began, None for one that begins now; the first process says which day.

    Raises UserError in every process where one of them cannot prepare, or where they have not the same rows.
    """
    if rendered_at is None:
        today = of_first_process(day_of(config.data).toordinal())
        rendered_at = datetime.date.fromordinal(today).isoformat()

    def work() -> PreparedData:
        return prepare(
            config.data, model_path=str(tokenizer_place(config)), vocab_size=vocab_size, seed=config.seed,
            epochs=config.train.epochs, rows=rows, normalize=config.train.normalize, rendered_at=rendered_at, log=log,
        )  # fmt: skip

    first = jax.process_index() == 0
    data = agree(lambda: work() if first else None)
    data = agree(lambda: data if first else work())
    check_same(
        {f"data ({name})": value for name, value in data.fingerprints.items()},
        "Give every process the same data files, tokenizer and template.",
    )
    return data
