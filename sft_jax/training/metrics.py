"""The log of a run: records in metrics.jsonl, TensorBoard and W&B, and what a later start reads from them."""

from collections.abc import Iterable, Iterator
from typing import Any

from sft_jax.config import Config, to_dict
from sft_jax.training.tensorboard import EventFile
from sft_jax.training.wandb_run import WandbRun
from sft_jax.training.workdir import Workdir, plain

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TRAIN = "train"  # the split of training records; every other one is an eval set

Record = dict[str, Any]


class MetricsLog:
    """Writes records to metrics.jsonl, and to TensorBoard and W&B where asked, as a context manager.

    Only the first process has one.
    """

    def __init__(self, workdir: Workdir, config: Config, purge_step: int):
        """Opens what `config.log` asks for. TensorBoard hides earlier records from step `purge_step` on."""
        self._workdir, project = workdir, config.log.wandb
        self._wandb = WandbRun(workdir, project, to_dict(config)) if project else None
        self._board = EventFile(workdir.path / "tensorboard", purge_step) if config.log.tensorboard else None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._wandb is not None:
            self._wandb.close(error)
        if self._board is not None:
            try:
                self._board.close()
            except Exception:
                if error is None:  # else the disk, most likely, has said so already
                    raise

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Writes {"step", "split", name: value, ...}; a number that is not finite is null there.

        TensorBoard and W&B get the numbers, those inside sections under names such as "slices/language/fr/loss".
        """
        self._workdir.append_lines(METRICS_FILE, [{"step": step, "split": split, **values}])
        numbers = dict(_numbers(plain(values)))
        if self._board is not None:
            for name, value in numbers.items():
                self._board.scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.write(step, split, numbers)

    def write_samples(self, samples: list[Record]) -> None:
        self._workdir.append_lines(SAMPLES_FILE, samples)


def _numbers(values: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value


def cut_logs_back(work: Workdir, step: int, evaluate_again: bool) -> None:
    """Removes from the logs what a run that goes on after `step` will write again.

    Args:
        step: the step of the checkpoint; -1 for a run that begins anew.
        evaluate_again: whether the evaluations of `step` itself are made again.
    """

    def keep(record: Record, evaluation: bool) -> bool:
        return record["step"] < step or record["step"] == step and not (evaluation and evaluate_again)

    work.cut_back(METRICS_FILE, lambda record: keep(record, record.get("split") != TRAIN))
    work.cut_back(SAMPLES_FILE, lambda record: keep(record, True))


def is_evaluated(records: Iterable[Record], step: int, names: Iterable[str]) -> bool:
    """Returns whether the log has the evaluation of every set in `names` at `step`.

    The records of an evaluation are written after its samples, so where they are there, all is.
    """
    return set(names) <= {record.get("split") for record in records if record["step"] == step}


def evaluations(records: Iterable[Record], names: Iterable[str]) -> tuple[dict[str, Record], dict[str, Record]]:
    """Returns the first and the last evaluation of every set in `names`: two dicts set -> values."""
    first, last = {}, {}
    for record in sorted(records, key=lambda record: record["step"]):
        if (name := record.get("split")) in names:
            values = {key: value for key, value in record.items() if key not in ("step", "split")}
            first.setdefault(name, values)
            last[name] = values
    return first, last


def last_training_record(records: Iterable[Record]) -> Record:
    """Returns the values of the newest training record, or nothing."""
    found = [record for record in records if record.get("split") == TRAIN]
    return {key: value for key, value in found[-1].items() if key not in ("step", "split")} if found else {}
