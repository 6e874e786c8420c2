"""Evaluates a model on held-out data: python -m sft_jax.evaluate --model RUN_OR_DIRECTORY [--config configs/sft.py] [--config.KEY=VALUE ...]

Loss, perplexity, bits per byte and accuracy of every set of data.eval, and of its slices (--slice COLUMN); with --generate N
answers to N held-out prompts of each set, and their scores (--scorer, several times); with --tasks benchmarks of
lm-evaluation-harness. The model is a Hugging Face directory or hub id, an adapter, the workdir of a run, or one of its
checkpoints (RUN/checkpoints/STEP). Of a run the configuration is its own unless --config names another, with --config.KEY=VALUE
over it. Exit codes: 0 done, 2 wrong input.
"""

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path

from absl import flags

from sft_jax import cli
from sft_jax.config import AdapterConfig, Config
from sft_jax.decoding_flags import define_decoding_flags
from sft_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory, hub id, adapter, workdir of a run or RUN/checkpoints/STEP.")
_BASE = flags.DEFINE_string("base", None, "The base of an adapter, where it is not where the adapter says.")
_CONFIG = cli.define_config_flag()
_SLICES = flags.DEFINE_multi_string("slice", [], "Tell results apart by the values of this column of the rows; several times. Default: eval.slices.")
_GENERATE = flags.DEFINE_integer("generate", None, "Prompts of each set to answer; -1 = all. Default: eval.generate.")
_SCORERS = flags.DEFINE_multi_string(
    "scorer", [], "How answers are scored: NAME, NAME:ARGUMENT or path/to/file.py:function; several times. Default: eval.scorers."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Tokens of an answer, at most. Default: eval.max_new_tokens.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows, and answers, that are computed together. Default: eval.batch_size.")
_DECODING = define_decoding_flags(
    "Of the draws; the prompts follow the configuration's seed. Defaults of how answers are drawn: eval.sampling, eval.stop."
)
_SAMPLES = flags.DEFINE_string("samples", None, "Write prompts, references, answers and scores to this file, a JSON object a line.")
_TASKS = flags.DEFINE_list("tasks", [], "Benchmarks of lm-evaluation-harness by name, or files of tasks (.yaml).")
_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "With --tasks: examples in each prompt. Default: what the task says.")
_LIMIT = flags.DEFINE_integer("limit", None, "With --tasks: examples of each task, at most.")
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "With --tasks: ask in the form of a chat.")
_JSON = flags.DEFINE_bool("json", False, "Write the results as one JSON object to standard output.")


def main() -> None:
    if _TASKS.value and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the harness; read when tqdm is imported
    if not _MODEL.value:
        raise UserError("--model: is missing; name a Hugging Face directory, a hub id or the workdir of a run.")

    from sft_jax.evaluation.scorers import find_scorers
    from sft_jax.hf.source import run_and_step
    from sft_jax.versions import check_versions

    check_versions()
    path, step = run_and_step(_MODEL.value)
    config = _config(path)
    _DECODING.checked()
    _check_flags(config)
    benchmark = _benchmark(config) if _TASKS.value else None
    find_scorers(config.eval.scorers, "--scorer")  # what is wrong is told before anything is loaded
    samples = Path(_SAMPLES.value).expanduser() if _SAMPLES.value else None
    if samples is not None and not samples.parent.is_dir():
        raise UserError(f"--samples: there is no folder {samples.parent}; make it, or name a file in another one.")

    import jax

    from sft_jax.evaluation.offline import Subject, evaluate_model, mesh_for
    from sft_jax.evaluation.tables import EvaluationProgress, print_tables
    from sft_jax.hf.progress import LoadProgress
    from sft_jax.training.platform import join_processes, set_up_platform
    from sft_jax.training.resolved import resolved

    set_up_platform(config.train.deterministic)
    join_processes(config.train.heartbeat_seconds)
    first = jax.process_index() == 0
    log = _say if first else lambda line: None
    config = resolved(config)
    mesh = mesh_for(config.mesh, cli.asks_for(_CONFIG, "mesh"), log)
    with EvaluationProgress(shown=first) as progress:
        evaluation = evaluate_model(
            Subject(path, step, _BASE.value), config, mesh,
            benchmark=partial(benchmark, progress=progress) if benchmark is not None else None,
            log=log,
            loading=partial(LoadProgress, shown=first), progress=progress,
        )  # fmt: skip
    if not first:
        return
    if samples is not None:
        _write(samples, evaluation.records())
    found = evaluation.to_dict()
    if _JSON.value:
        cli.print_json(found)
    else:
        print_tables(found)


def _config(path: str) -> Config:
    """Returns the configuration of --config, else that of the run, with what flags say; the model is that of --model."""
    from sft_jax.hf.source import as_folder, is_run, run_config

    folder = as_folder(path)
    if cli.has_recipe(_CONFIG):
        config = cli.read_config(_CONFIG, needs_data=False, model=path)
    elif folder.is_dir() and is_run(folder):
        config = cli.read_config_over(_CONFIG, run_config(folder))
    elif _TASKS.value:
        config = cli.read_config_over(_CONFIG, {"model": {"path": path}, "data": {}})
    else:
        raise UserError(
            f"--config: is missing, and {path} is no run with a configuration of its own; name a recipe and the data, such as "
            "--config configs/sft.py --config.data.eval=held_out.jsonl."
        )
    if _MAX_NEW_TOKENS.value is not None and _MAX_NEW_TOKENS.value < 1:
        raise UserError(f"--max_new_tokens: must be at least 1, not {_MAX_NEW_TOKENS.value}.")
    if _BATCH_SIZE.value is not None and _BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size: must be at least 1, not {_BATCH_SIZE.value}.")
    if _GENERATE.value is not None and _GENERATE.value < -1:
        raise UserError(f"--generate: must be 0 (none), a number of prompts or -1 (all), not {_GENERATE.value}.")
    given = {"generate": _GENERATE.value, "max_new_tokens": _MAX_NEW_TOKENS.value, "batch_size": _BATCH_SIZE.value}
    changed = {name: value for name, value in given.items() if value is not None}
    for name, holder in (("scorers", _SCORERS), ("slices", _SLICES), ("stop", _DECODING.stop)):
        if holder.value:
            changed[name] = tuple(holder.value)
    changed["sampling"] = dataclasses.replace(config.eval.sampling, **_DECODING.given)
    model = dataclasses.replace(config.model, path=path)
    return dataclasses.replace(config, model=model, adapter=AdapterConfig(), eval=dataclasses.replace(config.eval, **changed))


def _check_flags(config: Config) -> None:
    """Raises UserError for flags that change nothing, and where nothing is to be evaluated."""
    answers = {
        "--scorer": _SCORERS, "--max_new_tokens": _MAX_NEW_TOKENS, **_DECODING.named, "--samples": _SAMPLES,
    }  # fmt: skip
    tasks = {"--num_fewshot": _FEWSHOT, "--limit": _LIMIT, "--apply_chat_template": _CHAT}
    for name, holder in answers.items():
        if holder.present and not config.eval.generate:
            raise UserError(f"{name}: changes nothing, since no prompts are answered; add --generate=N, or -1 for all, or leave it out.")
    for name, holder in tasks.items():
        if holder.present and not _TASKS.value:
            raise UserError(f"{name}: is of benchmarks; name some with --tasks, or leave it out.")
    if _LIMIT.value is not None and _LIMIT.value < 1:
        raise UserError(f"--limit: must be at least 1, not {_LIMIT.value}; leave it out for all examples.")
    if _FEWSHOT.value is not None and _FEWSHOT.value < 0:
        raise UserError(f"--num_fewshot: must be 0 or more, not {_FEWSHOT.value}.")
    for name, holder in (("--slice", _SLICES), ("--generate", _GENERATE)):
        if holder.present and not config.data.eval:
            raise UserError(f"{name}: is of held-out rows and data.eval is empty; name a file of them in data.eval.")
    if not config.data.eval and not _TASKS.value:
        raise UserError(
            "data.eval: is empty, so there is nothing to evaluate on; name a file of held-out rows, such as "
            "--config.data.eval=held_out.jsonl, or benchmarks with --tasks."
        )


def _benchmark(config: Config):
    """Returns what runs the benchmarks of --tasks on a model."""
    from sft_jax.evaluation.harness import Benchmarks, HarnessModel, find_tasks, run_benchmarks

    asked = Benchmarks(tuple(_TASKS.value), _FEWSHOT.value, _LIMIT.value, _CHAT.value)
    tasks = find_tasks(asked)

    def run(decoder, tokenizer, progress) -> dict:
        model = HarnessModel(
            decoder, tokenizer, batch_size=_batch_size(config), seed=config.eval.sampling.seed, chat_template=config.data.chat_template,
            chat_template_kwargs=config.data.chat_template_kwargs, progress=progress,
        )  # fmt: skip
        return run_benchmarks(model, asked, tasks, _say)

    return run


def _batch_size(config: Config) -> int:
    return config.eval.batch_size or config.train.micro_batch_size or config.train.batch_size


def _write(path: Path, records: list[dict]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    except OSError as error:
        raise UserError(f"--samples: {path} cannot be written ({error.strerror}).") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__)
