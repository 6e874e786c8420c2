"""What a run tells: totals before it starts, the tables at the start, manifests, and the summary at the end."""

import math
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from sft_jax.batch import Batch
from sft_jax.config import Config, to_dict
from sft_jax.data.pipeline import RowStream
from sft_jax.data.prepare import PreparedData
from sft_jax.hf.source import Source
from sft_jax.model.sharding import largest_replicated
from sft_jax.model.spec import DecoderSpec
from sft_jax.training.hardware import peak_flops, peak_memory, training_flops
from sft_jax.training.loop import Outcome
from sft_jax.training.optim import Optimizer
from sft_jax.training.start import Start
from sft_jax.training.state import TrainState
from sft_jax.training.workdir import Workdir

_PACKAGES = ("sft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "tokenizers")


def say(text: str) -> None:
    """Prints a line, in the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def print_totals(config: Config, data: PreparedData, start: Start, total_steps: int) -> None:
    """Prints what will be trained, exactly, before it starts; and what a longer run means for the schedule."""
    stream = data.train
    slots = stream.total_rows * stream.max_length
    say(
        f"Training data: {stream.total_rows:,} rows of {stream.max_length} with {stream.examples:,} examples, "
        f"{stream.real_tokens:,} real tokens ({stream.real_tokens / slots:.1%} of the rows), "
        f"{stream.supervised_tokens:,} supervised."
    )
    for name, held_out in data.eval.items():
        say(f"Held-out data '{name}': {held_out.examples:,} examples, {held_out.supervised_tokens:,} supervised tokens.")
    say(f"Steps: {total_steps:,} of {config.train.batch_size} rows; {max(total_steps - start.step, 0):,} to go.")
    if start.manifest and start.manifest["total_steps"] != total_steps:
        say(
            f"The run had {start.manifest['total_steps']:,} steps and has {total_steps:,} now: from step {start.step + 1:,} on the learning "
            f"rate follows the {config.optim.schedule} schedule over {total_steps:,} steps."
        )


def print_model(optimizer: Optimizer, state: TrainState, mesh: Mesh) -> None:
    """Prints the parameter counts, what the groups chose where they chose something, and what the mesh replicates."""
    trained = sum(math.prod(choice.shape) for choice in optimizer.choices if not choice.frozen)
    frozen = sum(math.prod(choice.shape) for choice in optimizer.choices if choice.frozen)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(f"Model: {trained:,} trained and {frozen:,} frozen parameters on {mesh.size} {mesh.devices.flat[0].platform} devices ({axes}).")
    if any(choice.pattern for choice in optimizer.choices):
        for line in optimizer.log():
            say(f"  {line}")
    replicated = [row for row in largest_replicated(state, mesh) if row.bytes_per_device >= 2**20]
    if replicated:
        say("Largest arrays of which every device holds a copy:")
        for row in replicated:
            say(f"  {row.path}  {'x'.join(map(str, row.shape))} {row.dtype}  {row.bytes_per_device / 2**20:,.0f} MiB x {row.copies}")


def eval_line(step: int, name: str, values: dict[str, float]) -> str:
    """Returns a line about one evaluation."""
    shown = "  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
    return f"step {step}  {name}: {shown}"


def describe_rows(stream: RowStream, batch: Batch, count: int = 8) -> str:
    """Returns file and line of the examples of a batch, the first `count` of them."""
    examples = np.unique(batch.examples[batch.examples >= 0])
    places = []
    for example in examples[:count]:
        _, file, line, turn = stream.identity(int(example))
        places.append(f"{file}:{line}" + (f" (turn {turn})" if turn >= 0 else ""))
    return ", ".join(places) + (f" and {len(examples) - count} more examples" if len(examples) > count else "")


def checkpoint_manifest(config: Config, data: PreparedData, source: Source, position: int, total_steps: int) -> dict[str, Any]:
    """Returns what a checkpoint says beside its arrays."""
    return {
        "position": position,
        "total_steps": total_steps,
        "plan_hash": data.train.plan_hash,
        "rendered_at": data.rendered_at,
        "fingerprints": data.fingerprints,
        "config": to_dict(config),
        "model_config": source.config,
        "versions": versions(),
    }


def run_manifest(config: Config, data: PreparedData, source: Source, mesh: Mesh, optimizer: Optimizer) -> dict[str, Any]:
    """Returns what WORKDIR/manifest.json says: everything that decides the numbers of the run beside its configuration."""
    return {
        "versions": versions(),
        "git_revision": _git_revision(),
        "fingerprints": data.fingerprints,
        "plan_hash": data.train.plan_hash,
        "base_model": source.name,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "device": mesh.devices.flat[0].device_kind,
        "parameters": {
            "trained": sum(math.prod(choice.shape) for choice in optimizer.choices if not choice.frozen),
            "frozen": sum(math.prod(choice.shape) for choice in optimizer.choices if choice.frozen),
        },
        "seed": config.seed,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git_revision() -> str | None:
    """Returns the commit of the package's checkout, with a + where files were changed; None outside one."""
    folder = Path(__file__).parent
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+" if changed.stdout.strip() else "")


def summary(
    outcome: Outcome, seconds: dict[str, float], evaluations: dict[int, dict[str, dict[str, float]]],
    spec: DecoderSpec, choices: Iterable[Any], mesh: Mesh,
) -> dict[str, Any]:  # fmt: skip
    """Returns WORKDIR/summary.json. Rates leave out the first step, which compiles, evaluation and checkpoints."""
    window = outcome.window
    rate = 1 / window.timed_seconds if window.timed_seconds else 0.0
    flops = training_flops(
        matmul_parameters(choices), True, spec.heads * spec.head_size,
        window.totals["real_tokens"], window.totals["attention_pairs"],
    )  # fmt: skip
    peak = peak_flops(mesh.devices.flat[0])
    steps = sorted(evaluations)
    return {
        "finished": True,
        "steps": outcome.step,
        "rows": outcome.position,
        "train": outcome.last,
        "eval_first": evaluations[steps[0]] if steps else {},
        "eval_last": evaluations[steps[-1]] if steps else {},
        "real_tokens_per_second": window.totals["real_tokens"] * rate,
        "supervised_tokens_per_second": window.totals["supervised_tokens"] * rate,
        "seconds_per_step": window.timed_seconds / window.timed_steps if window.timed_steps else None,
        "model_flops_per_second": flops * rate,
        "mfu": flops * rate / (peak * mesh.size) if peak else None,
        "peak_memory_bytes": peak_memory(),
        "seconds_to_first_step": outcome.first_step_at - psutil.Process().create_time() if outcome.first_step_at else None,
        "seconds": {**seconds, "train": window.timed_seconds},
        "nonfinite_steps": window.left_out["nonfinite"],
        "empty_steps": window.left_out["empty"],
    }


def matmul_parameters(choices: Iterable[Any]) -> int:
    """Returns the number of parameters that multiply every token: kernels and head, not the embedding lookup.

    A tied embedding counts once, as the head that it also is.
    """
    shapes = {choice.path: choice.shape for choice in choices}
    tied = not any(path.startswith("lm_head") for path in shapes)
    return sum(math.prod(shape) for path, shape in shapes.items() if path.endswith("kernel") or (tied and path.startswith("embed.")))


def print_summary(values: dict[str, Any], work: Workdir, exported: bool) -> None:
    """Prints the end of a run."""
    first, last = values["eval_first"], values["eval_last"]
    for name in last:
        for key, value in last[name].items():
            before = first.get(name, {}).get(key)
            if isinstance(value, float):
                say(f"{name} {key}: {before:.4f} before, {value:.4f} after" if before is not None else f"{name} {key}: {value:.4f}")
    say(
        f"Done: {values['steps']:,} steps, {values['real_tokens_per_second']:,.0f} real and "
        f"{values['supervised_tokens_per_second']:,.0f} supervised tokens/s. Summary: {work.path / 'summary.json'}"
    )
    if exported:
        say(f"The tuned model lies in {work.path / 'export'}.")


