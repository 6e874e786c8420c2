"""What a run tells: totals before it starts, the tables at the start, manifests, and the summary at the end."""

import collections
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from sft_jax.batch import Batch
from sft_jax.checkpoint.checkpoints import Checkpoints
from sft_jax.config import Config, TrainConfig, to_dict
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.prepare import PreparedData
from sft_jax.hf.source import ADAPTER, Source
from sft_jax.model.adapters import AdapterPlan, is_adapter
from sft_jax.model.sharding import largest_replicated, named_leaves
from sft_jax.model.spec import DecoderSpec, ExpertsSpec
from sft_jax.training.best import Best
from sft_jax.training.groups import Choice
from sft_jax.training.hardware import peak_flops, peak_memory, training_flops
from sft_jax.training.loop import Outcome
from sft_jax.training.metrics import SAMPLES_FILE, evaluations, last_training_record
from sft_jax.training.optim import Optimizer
from sft_jax.training.revision import git_revision, versions
from sft_jax.training.start import Start
from sft_jax.training.state import TrainState
from sft_jax.training.window import Window
from sft_jax.training.workdir import Workdir


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
    late = [step for step in config.eval.at if step > total_steps]
    if late:
        say(f"eval.at: {', '.join(map(str, late))} come after the last step, {total_steps:,}, so nothing is evaluated there.")
    unused = f" (train.steps wins: train.epochs={config.train.epochs:g} is not used)" if unused_epochs(config) else ""
    say(f"Steps: {total_steps:,} of {config.train.batch_size} rows{unused}; {max(total_steps - start.step, 0):,} to go.")
    if start.manifest and start.manifest["total_steps"] != total_steps:
        say(
            f"The run had {start.manifest['total_steps']:,} steps and has {total_steps:,} now: from step {start.step + 1:,} on the learning "
            f"rate follows the {config.optim.schedule} schedule over {total_steps:,} steps."
        )


def unused_epochs(config: Config) -> bool:
    """Returns whether `train.epochs` was set and changes nothing, because `train.steps` wins.

    That is told and not refused: a recipe has its epochs, and a few steps of it on trial are a flag.
    """
    return config.train.steps > 0 and config.train.epochs != TrainConfig.epochs


def print_finished(config: Config, work: Workdir, early: bool) -> None:
    """Prints that there is nothing left to do, and the key that changes it."""
    key = "train.patience" if early else "train.steps" if config.train.steps else "train.epochs"
    say(f"This run has finished. Its summary is {work.shown}/summary.json; raise {key} to extend it.")


def print_model(optimizer: Optimizer, state: TrainState, spec: DecoderSpec, adapters: AdapterPlan | None, mesh: Mesh) -> None:
    """Prints the parameter counts, adapters, what was chosen for each parameter where that differs, and what the mesh replicates."""
    trained, frozen = parameter_counts(optimizer.choices)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(f"Model: {trained:,} trained and {frozen:,} frozen parameters on {mesh.size} {mesh.devices.flat[0].platform} devices ({axes}).")
    if spec.vocab_rows > spec.vocab_size:
        say(f"Its vocabulary of {spec.vocab_size:,} is held in {spec.vocab_rows:,} rows, which devices can divide; the others take no part.")
    if adapters is not None:
        rest = "All else of the base" if adapters.trained else "The base"
        say(f"Adapters: {adapters}. {rest} stays as it is and is in no checkpoint.")
        count, size = stored_kernels(state)
        if count:
            say(f"Base: {count:,} parameters are quantised, {size / 2**20:,.1f} MiB, {size / count:.3f} bytes each with scales.")
    if any(choice.pattern for choice in optimizer.choices) or len({choice.optimizer for choice in optimizer.choices}) > 1:
        for line in optimizer.log():
            say(f"  {line}")
    replicated = [row for row in largest_replicated(state, mesh) if row.bytes_per_device >= 2**20]
    if replicated:
        say("Largest arrays of which every device holds a copy:")
        for row in replicated:
            say(f"  {row.path}  {'x'.join(map(str, row.shape))} {row.dtype}  {row.bytes_per_device / 2**20:,.0f} MiB x {row.copies}")


def parameter_counts(choices: Iterable[Choice]) -> tuple[int, int]:
    """Returns the numbers of trained and of frozen parameters."""
    counts = collections.Counter()
    for choice in choices:
        counts[choice.frozen] += choice.parameters
    return counts[False], counts[True]


def stored_kernels(state: TrainState) -> tuple[int, int]:
    """Returns how many parameters of the base are stored in few bits, and the bytes that they take, scales included."""
    parts = [leaf for path, leaf in named_leaves(state.frozen) if path.endswith((".kernel.codes", ".kernel.scales"))]
    values = [leaf.get_value() for leaf in parts]
    count = sum(leaf.numbers * math.prod(value.shape) for leaf, value in zip(parts, values, strict=True))
    return count, sum(math.prod(value.shape) * value.dtype.itemsize for value in values)


def eval_line(step: int, name: str, values: dict[str, Any]) -> str:
    """Returns a line about one evaluation: its numbers, not those of slices."""
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    shown = "  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items())
    return f"step {step}  {name}: {shown}"


def used_data(stream: RowStream, row: int) -> dict[str, float]:
    """Returns for the log how much of the data the rows before `row` are: epochs, and exact counts of each data set.

    They follow from the plan and the position alone, so a run that continues logs what one that never stopped would.
    """
    values = {"epoch": stream.epoch_at(row)}
    for name, counts in stream.set_counts(row).items():
        values |= {f"data/{name}/{what}": count for what, count in counts._asdict().items() if what != "tokens"}
    return values


def describe_rows(stream: RowStream, batch: Batch, count: int = 8) -> str:
    """Returns file and line of the examples of a batch, the first `count` of them."""
    examples = np.unique(batch.examples[batch.examples >= 0])
    places = []
    for example in examples[:count]:
        _, file, line, turn = stream.identity(int(example))
        places.append(f"{file}:{line}" + (f" (turn {turn})" if turn >= 0 else ""))
    return ", ".join(places) + (f" and {len(examples) - count} more examples" if len(examples) > count else "")


def resume_point(checkpoints: Checkpoints) -> str:
    """Returns from where the same command goes on."""
    return "at the beginning, since nothing was saved yet" if checkpoints.last is None else f"after step {checkpoints.last}, its newest checkpoint"


def checkpoint_manifest(
    config: Config, data: PreparedData, source: Source, adapters: AdapterPlan | None, position: int, total_steps: int, window: Window,
    best: Best,
) -> dict[str, Any]:  # fmt: skip
    """Returns what a checkpoint says beside its arrays."""
    return {
        "position": position,
        "total_steps": total_steps,
        "window": window.state(),
        "best": best.state(),
        "plan_hash": data.train.plan_hash,
        "rendered_at": data.rendered_at,
        "fingerprints": data.fingerprints,
        "config": to_dict(config),
        "model_config": source.config,
        "adapters": adapters.to_dict() if adapters else None,
        "base_fingerprint": source.fingerprint if adapters else None,
        "versions": versions(),
    }


def run_manifest(config: Config, data: PreparedData, source: Source, mesh: Mesh, optimizer: Optimizer) -> dict[str, Any]:
    """Returns what WORKDIR/manifest.json says: everything that decides the numbers of the run beside its configuration."""
    return {
        "versions": versions(),
        "git_revision": git_revision(),
        "fingerprints": data.fingerprints,
        "plan_hash": data.train.plan_hash,
        "base_model": source.name,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "device": mesh.devices.flat[0].device_kind,
        "parameters": dict(zip(("trained", "frozen"), parameter_counts(optimizer.choices), strict=True)),
        "seed": config.seed,
    }


def summary(
    outcome: Outcome, seconds: dict[str, float], records: list[dict[str, Any]], eval_sets: Iterable[str],
    spec: DecoderSpec, choices: Iterable[Choice], mesh: Mesh, hangs: int, best: Best,
) -> dict[str, Any]:  # fmt: skip
    """Returns WORKDIR/summary.json.

    Rates, counts and evaluations are those of the whole run, from its beginning, also where it was stopped and
    continued. Rates leave out the first step of each start, which compiles, evaluation and checkpoints, and are None
    where nothing is left. Peak memory and `seconds` are of this process; its phases add up to its life so far.
    """
    run = outcome.window.run
    rates = run.rates()
    trained, frozen = matmul_parameters(choices, spec)
    width = spec.heads * (spec.head_size + spec.value_size) // 2
    flops = training_flops(trained, frozen, width, run.timed["real_tokens"], run.timed["attention_pairs"])
    flops_per_second = flops / run.seconds if rates else None
    peak = peak_flops(mesh.devices.flat[0])
    eval_first, eval_last = evaluations(records, set(eval_sets))
    seconds["train"] = seconds.get("train", 0.0) - outcome.first_step_seconds
    return {
        "finished": True,
        "steps": outcome.step,
        "rows": outcome.position,
        "train": last_training_record(records),
        "eval_first": eval_first,
        "eval_last": eval_last,
        "best": best.state(),
        "ended_early": outcome.ended_early,
        "real_tokens_per_second": rates.get("real_tokens_per_second"),
        "supervised_tokens_per_second": rates.get("supervised_tokens_per_second"),
        "seconds_per_step": rates.get("seconds_per_step"),
        "model_flops_per_second": flops_per_second,
        "mfu": flops_per_second / (peak * mesh.size) if peak and flops_per_second else None,
        "peak_memory_bytes": peak_memory(),
        "seconds_to_first_step": outcome.first_step_at - psutil.Process().create_time() if outcome.first_step_at else None,
        "seconds": {**seconds, "first_step": outcome.first_step_seconds},
        "nonfinite_steps": int(run.all["nonfinite"]),
        "empty_steps": int(run.all["empty"]),
        "hangs": hangs,  # dumps of stacks by the watchdog of this start
    }


def matmul_parameters(choices: Iterable[Choice], spec: DecoderSpec) -> tuple[int, int]:
    """Returns (trained, frozen): parameters that multiply every token, kernels and head, not the embedding lookup.

    A tied embedding counts once, as the head that it also is; of the experts' kernels as many as a token uses.
    """
    mixtures = {(layer.mlp.count, layer.mlp.chosen) for layer in spec.layers if isinstance(layer.mlp, ExpertsSpec)}
    used = dict(mixtures)  # experts of a kernel -> those that a token uses; a decoder has one kind of mixture
    choices = list(choices)
    tied = not any(choice.path.startswith("lm_head") for choice in choices)
    counts = {False: 0, True: 0}  # by whether it is frozen
    for choice in choices:
        added = is_adapter(choice.path) and choice.matrix and not choice.path.startswith("embed.")
        if added or choice.path.endswith((".kernel", ".kernel.codes")) or (tied and choice.path.startswith("embed.")):
            size = choice.parameters
            if choice.path in ("embed.embedding", "lm_head.kernel"):
                size = size * spec.vocab_size // spec.vocab_rows
            is_expert = len(choice.shape) == 4  # [repeats, experts, in, out]
            counts[choice.frozen] += size * used[choice.shape[1]] // choice.shape[1] if is_expert else size
    return counts[False], counts[True]


def print_summary(values: dict[str, Any], work: Workdir, exported: Path | None) -> None:
    """Prints the end of a run, and where what it exported lies."""
    first, last = values["eval_first"], values["eval_last"]
    for name in last:
        for key, value in last[name].items():
            before = first.get(name, {}).get(key)
            if isinstance(value, float):
                say(f"{name} {key}: {before:.4f} before, {value:.4f} after" if before is not None else f"{name} {key}: {value:.4f}")
    for line in sample_lines(work.read_lines(SAMPLES_FILE)):
        say(line)
    real, supervised = values["real_tokens_per_second"], values["supervised_tokens_per_second"]
    rates = f", {real:,.0f} real and {supervised:,.0f} supervised tokens/s" if real is not None else ""
    say(f"Done: {values['steps']:,} steps{rates}. Summary: {work.shown}/summary.json")
    if exported is not None and exported.name == ADAPTER:
        say(f"The adapter lies in {work.shown}/{exported.name}; python -m sft_jax.export --model {work.shown} --merge writes the whole model.")
    elif exported is not None:
        say(f"The tuned model lies in {work.shown}/{exported.name}.")


def sample_lines(samples: list[dict[str, Any]], count: int = 3, width: int = 160) -> list[str]:
    """Returns lines that show the first `count` held-out prompts of each set with the first and the last answer.

    Texts are cut at `width` characters; samples.jsonl has all of all.
    """
    answers: dict[tuple, list[dict[str, Any]]] = {}
    for sample in samples:
        answers.setdefault((sample["set"], *sample["example"].values()), []).append(sample)
    lines, shown = [], collections.Counter()
    for (name, file, line, turn), given in answers.items():
        shown[name] += 1
        if shown[name] > count:
            continue
        first, last = given[0], given[-1]
        lines.append(f"{name}, {file}:{line}" + (f" (turn {turn})" if turn >= 0 else ""))
        texts = {"prompt": first["prompt"], "reference": first["reference"], "before": first["generation"], "after": last["generation"]}
        for label, text in texts.items():
            text = text.replace("\n", "\\n")
            lines.append(f"  {label + ':':<10} {text if len(text) <= width else text[:width] + ' ...'}")
    return lines
