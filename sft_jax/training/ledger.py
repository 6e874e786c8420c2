"""What a run writes about its examples while it trains: sums that the step returns anyway, kept until the next checkpoint.

Rows are a function of the row number, so which documents a step has had follows from the plan, on any mesh and any number of
processes, and the first process writes for all of them.
"""

from typing import Any

import numpy as np

from sft_jax.data.packing.pipeline import RowStream
from sft_jax.dynamics.parts import DOCUMENTS, FOLDER, Exposures, encode_documents, encode_exposures, part_name, part_steps, placed, read_part
from sft_jax.training.workdir import Workdir


class Ledger:
    """The exposures since the last part, and where they go."""

    def __init__(self, work: Workdir, stream: RowStream, step: int, position: int):
        """Goes on after `step`, with the row of the stream at `position`."""
        self._work, self._stream, self._step, self._row = work, stream, step, position
        self._kept: list[Exposures] = []

    def add(self, step: int, position: int, metrics: dict[str, Any]) -> None:
        """Keeps the sums of a step, the one after that of the last call; `position` is the row after its last one.

        `metrics` are those of the step, on the host: per_example_loss, per_example_weight and per_example_correct, each
        [A, B, S] or with any other leading dimensions of rows in their order.
        """
        sums = [np.asarray(metrics[name]) for name in ("per_example_loss", "per_example_weight", "per_example_correct")]
        documents, *sums = placed(self._stream, self._row, position, *sums)
        self._kept.append(Exposures(np.full(len(documents), step, np.int32), documents.astype(np.int32), *sums))
        self._step, self._row = step, position

    def write(self) -> None:
        """Writes what was kept since the last part, if there is anything; called before each checkpoint, and at the end."""
        if self._kept:
            part = Exposures.concatenate(self._kept)
            first = int(part.step[0])
            self._work.write_bytes(f"{FOLDER}/{part_name(first, self._step)}", encode_exposures(part))
            self._kept = []


def cut_ledger_back(work: Workdir, step: int) -> None:
    """Removes the exposures of steps after `step`, which a run that goes on from there makes again; -1 for all."""
    folder = work.path / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        steps = part_steps(path.name)
        if steps is None or steps[1] <= step:
            continue
        if steps[0] <= step:
            part = read_part(path)
            work.write_bytes(f"{FOLDER}/{part_name(steps[0], step)}", encode_exposures(part.select(part.step <= step)))
        work.remove(f"{FOLDER}/{path.name}")


def describe_documents(work: Workdir, stream: RowStream, fingerprints: dict[str, str]) -> None:
    """Writes what the documents of the ledger are; `fingerprints` are those of the rows of each set, by name."""
    work.write_bytes(f"{FOLDER}/{DOCUMENTS}", encode_documents(stream, fingerprints))
