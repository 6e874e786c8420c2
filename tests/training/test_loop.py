"""The loop never waits for a step that it has just started."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_run import tiny_config

from sft_jax.batch import Batch
from sft_jax.config_parsing import parse_config
from sft_jax.model.sharding import make_mesh
from sft_jax.training import loop
from sft_jax.training.profiler import Profiler
from sft_jax.training.progress import Progress
from sft_jax.training.signals import StopSignal
from sft_jax.training.votes import Votes
from sft_jax.training.watchdog import Watchdog
from sft_jax.training.window import NAMES, Window
from sft_jax.training.workdir import Workdir

STEPS = 9


def test_metrics_are_fetched_two_steps_late(tmp_path, monkeypatch):
    """But for the first step, whose end is timed, and the last two, after which there is nothing to start."""
    started, fetched = [], []
    device_get = jax.device_get

    def train_step(state, batch):
        started.append(len(started) + 1)
        metrics = {name: jnp.float32(1.0) for name in (*NAMES, "grad_norm", "learning_rate")}
        return state, metrics | {"nonfinite": jnp.int32(0), "number": jnp.int32(started[-1]), "loss_terms": {}}

    def get(metrics):
        values = device_get(metrics)
        fetched.append((int(values["number"]), len(started)))
        return values

    monkeypatch.setattr(jax, "device_get", get)
    none = np.zeros((1, 1, 4), np.int32)
    batches = iter([(number, Batch(*[none] * len(Batch._fields))) for number in range(1, STEPS + 1)])
    hooks = loop.Hooks(
        *[lambda *_: None] * 5, attention_pairs=lambda batch: 1, keep_examples=lambda *_: None,
        begin_update=lambda state: lambda state: jnp.float32(0.5), used=lambda rows: {"epoch": rows / STEPS},
    )  # fmt: skip
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    outcome = loop.train(
        jnp.zeros(()), 0, 0, STEPS, batches, lambda batch: batch, train_step, parse_config(tiny_config(tmp_path, log__every=2, checkpoint__every=0)),
        hooks, Window(), None, Progress(STEPS, 0, shown=False), Profiler(None, 0, STEPS), Votes(StopSignal(), mesh),
            Watchdog(Workdir(tmp_path, lock=False), "stacks", 0),
    )  # fmt: skip
    assert outcome.step == STEPS and [number for number, _ in fetched] == list(range(1, STEPS + 1))
    ahead = [count - number for number, count in fetched]
    assert ahead == [0, *[2] * (STEPS - 3), 1, 0]
