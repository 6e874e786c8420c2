"""The run on Weights & Biases, where `log.wandb` names a project. The package is imported only then."""

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Iterator
from typing import Any

from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.training.workdir import Workdir

WANDB_FILE = "wandb.json"  # in the workdir: the id under which a later start goes on


def check_wandb() -> None:
    """Raises UserError where the package is missing, or the login, which a terminal is asked for."""
    found = importlib.util.find_spec("wandb")
    # Without an origin it is no package but a folder of that name, such as the one that W&B itself leaves behind.
    if found is None or found.origin is None:
        raise UserError("log.wandb: the package wandb is not installed; run pip install 'sft_jax[wandb]', or leave log.wandb out.")
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online":
        with _explained():
            wandb.login()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raises UserError for what W&B refuses."""
    import wandb

    try:
        yield
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"log.wandb: {reason}. Run 'wandb login', check the name of the project and the network, or set WANDB_MODE=offline "
            "and upload later with 'wandb sync'."
        ) from error


class WandbRun:
    """One run of a project. The same workdir is the same run, also when it is continued.

    The step of a record is a value of it and not W&B's own counter, which can only grow: what a killed run makes again
    is there twice, and nothing is lost.
    """

    def __init__(self, work: Workdir, project: str, config: dict[str, Any]):
        """Begins the run, or goes on with it. Raises UserError where W&B refuses, such as without a login."""
        import wandb

        known = work.read_json(WANDB_FILE)
        if known is None or known["project"] != project:
            known = {"project": project, "id": uuid.uuid4().hex[:12]}
            work.write_json(WANDB_FILE, known)
        with _explained():
            self._run = wandb.init(
                project=project, id=known["id"], resume="allow", name=work.shown.rpartition("/")[2], dir=str(work.path), config=config,
                allow_val_change=True, reinit="create_new", settings=wandb.Settings(console="off"),
            )  # fmt: skip
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

    def close(self, error: BaseException | None) -> None:
        """Uploads what is left. A run that was stopped with its state saved has not failed."""
        if not isinstance(error, KeyboardInterrupt):  # at once
            self._run.finish(exit_code=0 if error is None or isinstance(error, StoppedBySignal) else 1)
