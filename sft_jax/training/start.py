"""Where a run stands when it is started: at the beginning, or at its newest sound checkpoint."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from sft_jax.checkpoint.checkpoints import Checkpoints, DamagedCheckpoint, flatten_state, restore, unflatten_state, verify
from sft_jax.checkpoint.storage import Place
from sft_jax.config import Config, to_dict
from sft_jax.data.prepare import PreparedData
from sft_jax.errors import UserError
from sft_jax.hf.restore import check_base
from sft_jax.hf.source import Source
from sft_jax.model.adapters import AdapterPlan
from sft_jax.model.families import spec_from_config
from sft_jax.model.spec import DecoderSpec
from sft_jax.training.best import Best
from sft_jax.training.metrics import METRICS_FILE, is_evaluated
from sft_jax.training.resume import check_changes
from sft_jax.training.state import TrainState, saved_arrays
from sft_jax.training.window import Window
from sft_jax.training.workdir import Workdir

Log = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where this start begins."""

    checkpoints: Checkpoints
    manifest: dict[str, Any] | None  # of the checkpoint to continue from
    summary: dict[str, Any] | None  # of the run, where it has finished; it may have gone on after its last checkpoint

    @property
    def step(self) -> int:
        return self.manifest["step"] if self.manifest else 0

    @property
    def position(self) -> int:
        """Rows of the stream that have been used."""
        return self.manifest["position"] if self.manifest else 0

    @property
    def rendered_at(self) -> str | None:
        """The day that templates take for today, so that one that writes the date makes the tokens of the run so far."""
        return self.manifest.get("rendered_at") if self.manifest else None

    @property
    def next_step(self) -> int:
        """The first step that this start writes to the logs: 0, an evaluation, at the beginning."""
        return self.step + 1 if self.manifest else 0

    def window(self) -> Window:
        """Returns the sums of the run so far."""
        return Window(self.manifest["window"] if self.manifest else None)

    def rows(self, config: Config) -> int:
        """Returns the rows that the stream must have for `train.steps`, or 0 where epochs decide."""
        if not config.train.steps:
            return 0
        return self.position + max(config.train.steps - self.step, 0) * config.train.batch_size

    def total_steps(self, config: Config, data: PreparedData) -> int:
        """Returns the number of the last step, counted from the beginning of the run."""
        if config.train.steps:
            return config.train.steps
        left = max(data.train.total_rows - self.position, 0)
        return self.step + math.ceil(left / config.train.batch_size)

    def check_model(self, spec: DecoderSpec) -> None:
        """Raises UserError if model.path describes another model than the one that the run was begun with."""
        if self.manifest and spec_from_config(json.loads(self.manifest["model_config"])) != spec:
            raise UserError(
                "model.path: its config.json describes another model than the one that this run began with. Restore it, "
                "or start another run (model.path=WORKDIR begins from this one's weights)."
            )

    def check_data(self, data: PreparedData) -> None:
        """Raises UserError if the rows are not those that the run was begun with."""
        if self.manifest and self.manifest["plan_hash"] != data.train.plan_hash:
            changed = [
                name for name, value in data.fingerprints.items() if self.manifest["fingerprints"].get(name, value) != value
            ]
            raise UserError(
                f"data.train: {', '.join(changed) or 'the plan of rows'} changed since this run began, so it cannot be continued exactly. "
                "Restore the data files, the template and the tokenizer, and where rows ran into them data.row_timeout and "
                "data.row_memory_mb as they were, or start another run (model.path=WORKDIR begins "
                "from this one's weights)."
            )

    def best(self, config: Config) -> Best:
        """Returns what is known of the best states so far: a run that has finished was evaluated after its last checkpoint."""
        return Best(config, (self.summary or self.manifest or {}).get("best"))

    def finished(self, total_steps: int, best: Best) -> bool:
        """Returns whether nothing is left to do: all steps are made, or the run has ended early and still would."""
        if self.summary is None:
            return False
        return self.summary["steps"] >= total_steps or bool(self.summary.get("ended_early")) and best.ended

    def must_evaluate(self, config: Config, work: Workdir, names: Iterable[str], total_steps: int, best: Best) -> bool:
        """Returns whether the eval sets `names` are evaluated before the first step of this start.

        At the beginning of a run they are. Later, where an evaluation belongs to the step of the checkpoint and is not
        in the log, or not known to `best`, since the run was stopped before or after it.
        """
        if not names:
            return False
        if self.manifest is None:
            return True
        due = self.step == total_steps or config.eval.due(self.step)
        return due and not (best.knows(self.step) and is_evaluated(work.read_lines(METRICS_FILE), self.step, names))

    def check_base(self, source: Source, adapters: AdapterPlan) -> None:
        """Raises UserError if the adapters of the checkpoint belong to another base, or are not those of `adapters`."""
        if self.manifest:
            check_base(self.manifest["base_fingerprint"], source, "model.path")
            if AdapterPlan.from_dict(self.manifest["adapters"]).shape != adapters.shape:
                raise UserError(
                    "adapter.path: is not the adapter that this run began with: it is on other projections, or of another rank. "
                    "Restore it, or start another run."
                )

    def restore(self, like, base: Mapping[str, jax.Array] | None = None):
        """Returns the state of the checkpoint in the structure and shardings of `like`, or None at the beginning.

        `base` are the arrays, by path, that the checkpoint leaves out.
        """
        if self.manifest is None:
            return None
        return _restored(self.checkpoints.folder(self.step), like, base or {})


def restore_best(checkpoints: Checkpoints, step: int, state: TrainState, like: TrainState, adapters: AdapterPlan | None) -> TrainState:
    """Returns the parameters of the checkpoint of `step`, in the shardings of `like`, with what checkpoints leave out from `state`.

    It has no optimizer state. Raises UserError where the checkpoint is not there or damaged.
    """
    folder = checkpoints.folder(step)
    wanted = like._replace(opt_state=None)
    kept = flatten_state(state._replace(opt_state=None))
    saved = saved_arrays(state._replace(opt_state=None), adapters)
    try:
        verify(folder)
    except DamagedCheckpoint as error:
        raise UserError(
            f"{error}. It was the best of the run and is what would be exported; copy it back, or set checkpoint.best='' to export the last state."
        ) from error
    return _restored(folder, wanted, {name: x for name, x in kept.items() if name not in saved})


def _restored(folder: Place, like: TrainState, base: Mapping[str, jax.Array]) -> TrainState:
    saved = {name: x for name, x in flatten_state(like).items() if name not in base}
    try:
        return unflatten_state(like, {**base, **restore(folder, saved)})
    except DamagedCheckpoint as error:  # its files were sound a moment ago
        raise UserError(f"{error}. Check the memory and the disk of this machine, and start the same command again.") from error


def find_start(config: Config, work: Workdir, checkpoints: Checkpoints, log: Log) -> Start:
    """Finds the newest sound checkpoint of the run, and refuses changes of the configuration that it does not allow.

    A damaged checkpoint is named, set aside and the one before it used; where all are damaged the run stops, also when
    it is started once more.
    """
    for step in checkpoints.removed:
        log(f"Removed checkpoint {step}: its save was cut short and never took effect.")
    manifest, damaged = None, []
    for step in reversed(checkpoints.steps()):
        try:
            manifest = verify(checkpoints.folder(step))
            break
        except DamagedCheckpoint as error:
            place = checkpoints.set_aside(step)
            damaged.append(step)
            log(f"Checkpoint {step} is damaged and was set aside as {place.name}: {error}.")
    if manifest is None and (damaged or checkpoints.aside()):
        raise UserError(
            f"{work.checkpoints}: every checkpoint of this run is damaged. Copy one back from elsewhere, start again "
            "in another --workdir, or remove the damaged ones to begin this run anew."
        )
    summary = work.read_json("summary.json")
    if summary is not None and not (isinstance(summary, dict) and summary.get("finished")):
        summary = None
    # A run that finished without saving its last step is known by its summary.
    before = manifest["config"] if manifest else work.read_json("config.json") if summary else None
    if before is None:
        return Start(checkpoints, None, None)
    for change in check_changes(before, to_dict(config), config.checkpoint.allow_changes):
        log(f"Changed since the run was last started: {change}")
    if manifest:
        checkpoints.last = manifest["step"]
        log(f"Continuing from checkpoint {manifest['step']}.")
    return Start(checkpoints, manifest, summary)
