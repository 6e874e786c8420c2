"""Compares models, and ways of prompting them, on the same held-out rows: python -m sft_jax.compare --model BASE --model RUN [--shots 4] [...]

Should one fine-tune, or prompt? Every --model answers the same prompts; the first one (name the base first) also with examples from the
training rows in the prompt (--shots K, the same ones for all; --retrieve K, the K most similar ones; K or auto) and with the system prompts
of a file (--system). For each contender: scores with intervals, tokens and price of a request, latency; between any two a paired test and
wins, losses and ties; then advice, with its rule. A model is whatever sft_jax.evaluate takes. The data are those of --config, else of the
first model that is a run; --config.KEY=VALUE changes them. Exit codes: 0 done, 2 wrong input.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

from absl import flags

from sft_jax import cli
from sft_jax.config import AdapterConfig, Config
from sft_jax.decoding_flags import define_decoding_flags
from sft_jax.errors import UserError

_MODELS = flags.DEFINE_multi_string(
    "model", [], "Hugging Face directory, hub id, adapter, workdir of a run or RUN/checkpoints/STEP; several times."
)
_BASE = flags.DEFINE_string("base", None, "The base of adapters, where it is not where they say.")
_CONFIG = cli.define_config_flag()
_SET = flags.DEFINE_string("set", "", "The held-out set of data.eval, where there are several.")
_SHOTS = flags.DEFINE_multi_string("shots", [], "Examples in the prompt, drawn from data.train: a number, or auto; several times.")
_RETRIEVE = flags.DEFINE_multi_string("retrieve", [], "The same with the training rows most similar to each prompt.")
_SYSTEM = flags.DEFINE_string("system", None, "A text file of system prompts, each below a line '--- NAME'.")
_EACH = flags.DEFINE_bool("prompt_each", False, "Try examples and system prompts with every model, not only the first.")
_GENERATE = flags.DEFINE_integer("generate", -1, "Held-out prompts to answer, drawn by the configuration's seed; -1 = all.")
_POOL = flags.DEFINE_integer("pool", 10_000, "Training rows that examples are taken from, at most, drawn by the configuration's seed.")
_VALIDATION = flags.DEFINE_integer("validation", 64, "Training rows on which auto chooses a number of examples; they are never shown.")
_SCORERS = flags.DEFINE_multi_string(
    "scorer", [], "How answers are scored, as in sft_jax.evaluate; several times, advice is by the first. Default: eval.scorers."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Tokens of an answer, at most. Default: eval.max_new_tokens.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Answers that are computed together. Default: eval.batch_size.")
_DECODING = define_decoding_flags("Of the draws of tokens. Rows, examples and resamples follow the configuration's seed.")
_LATENCY = flags.DEFINE_integer("latency", 8, "Prompts that are answered one at a time to measure seconds; 0 = none.")
_PRICE_IN = flags.DEFINE_multi_float("price_in", [], "Price of a million prompt tokens: once for all, or once for each --model.")
_PRICE_OUT = flags.DEFINE_multi_float("price_out", [], "Price of a million answer tokens, likewise.")
_PRICE_CACHED = flags.DEFINE_multi_float(
    "price_cached", [], "Price of a million prompt tokens that all prompts begin with, likewise. Default: as --price_in."
)
_OUT = flags.DEFINE_string("out", None, "Write samples.jsonl, samples.html and results.json into this folder.")
_JSON = flags.DEFINE_bool("json", False, "Write the results as one JSON object to standard output.")


def main() -> None:
    if not _MODELS.value:
        raise UserError("--model: is missing; name a Hugging Face directory, a hub id or the workdir of a run, several times.")
    _check_flags()

    from sft_jax.comparison.contenders import make_contenders, read_examples
    from sft_jax.comparison.run import Request, comparable_scorers, compare
    from sft_jax.comparison.systems import read_systems
    from sft_jax.versions import check_versions

    check_versions()
    systems = read_systems(_SYSTEM.value) if _SYSTEM.value else []
    contenders = make_contenders(_MODELS.value, read_examples(_SHOTS.value, _RETRIEVE.value), systems, _EACH.value)
    options = _DECODING.checked()
    subjects = _subjects()
    prices = _prices()
    config = _config(subjects)
    comparable_scorers(config.eval.scorers)  # what is wrong is told before anything is loaded
    out = _out_folder()

    import jax

    from sft_jax.comparison.tables import print_tables
    from sft_jax.evaluation.offline import mesh_for
    from sft_jax.evaluation.samples import Decoding
    from sft_jax.evaluation.tables import EvaluationProgress
    from sft_jax.hf.progress import LoadProgress
    from sft_jax.training.platform import join_processes, set_up_platform

    set_up_platform(config.train.deterministic)
    join_processes(config.train.heartbeat_seconds)
    first = jax.process_index() == 0
    say = _say if first else lambda line: None
    mesh = mesh_for(config.mesh, cli.asks_for(_CONFIG, "mesh"), say)
    batch = config.eval.batch_size or config.train.micro_batch_size or config.train.batch_size
    request = Request(
        subjects, contenders, config.eval.scorers, Decoding(config.eval.max_new_tokens, batch, options, _DECODING.seed.value, _DECODING.texts),
        _SET.value, None if _GENERATE.value < 0 else _GENERATE.value, _POOL.value, _VALIDATION.value, _LATENCY.value, prices,
        of_run=not cli.has_recipe(_CONFIG),
    )  # fmt: skip
    with EvaluationProgress(shown=first) as progress:
        comparison = compare(request, config, mesh, log=say, loading=lambda name: LoadProgress(name, shown=first), between=progress)
    if not first:
        return
    for note in comparison.notes:
        say(note)
    found = comparison.to_dict()
    if out is not None:
        _write(out, comparison, found)
    if _JSON.value:
        cli.print_json(found)
    else:
        print_tables(comparison)


def _check_flags() -> None:
    """Raises UserError for numbers that are out of range, and for flags that change nothing."""
    for holder, least in ((_POOL, 1), (_VALIDATION, 2), (_LATENCY, 0), (_MAX_NEW_TOKENS, 1), (_BATCH_SIZE, 1)):
        if holder.value is not None and holder.value < least:
            raise UserError(f"--{holder.name}: must be at least {least}, not {holder.value}.")
    if _GENERATE.value != -1 and _GENERATE.value < 2:
        raise UserError(f"--generate: must be at least 2, or -1 for all, not {_GENERATE.value}.")
    counts = [*_SHOTS.value, *_RETRIEVE.value]
    if _POOL.present and not counts:
        raise UserError("--pool: is of examples in the prompt; ask for some with --shots or --retrieve, or leave it out.")
    if _VALIDATION.present and "auto" not in counts:
        raise UserError("--validation: is for choosing a number of examples; ask for that with --shots auto or --retrieve auto, or leave it out.")
    if _EACH.value and not counts and not _SYSTEM.value:
        raise UserError("--prompt_each: is of examples and system prompts; add --shots, --retrieve or --system, or leave it out.")
    if _PRICE_CACHED.value and not _PRICE_IN.value:
        raise UserError("--price_cached: says what is different from --price_in; give that too.")
    if bool(_PRICE_IN.value) != bool(_PRICE_OUT.value):
        raise UserError("--price_in, --price_out: only one of them is there; give both, since a request has a prompt and an answer.")


def _subjects():
    """Returns the models by name, in order. --base is that of every adapter."""
    from sft_jax.evaluation.offline import Subject
    from sft_jax.hf.source import has_adapter, place_of, run_and_step

    found = {}
    for name in _MODELS.value:
        path, step = run_and_step(name)
        found[name] = Subject(path, step, _BASE.value if _BASE.value is not None and has_adapter(place_of(path)) else None)
    if _BASE.value is not None and not any(subject.base for subject in found.values()):
        raise UserError("--base: names the base of an adapter, and no --model is one; leave it out.")
    return found


def _prices():
    """Returns the price of each model by name, nothing where none is given."""
    from sft_jax.comparison.results import Price

    def of_each(holder: flags.FlagHolder) -> list[float | None]:
        values, count = holder.value, len(_MODELS.value)
        if any(not math.isfinite(value) or value < 0 for value in values):
            raise UserError(f"--{holder.name}: must be 0 or more, not {', '.join(map(str, values))}.")
        if len(values) not in (0, 1, count):
            raise UserError(f"--{holder.name}: is there {len(values)} times for {count} models; give it once for all, or once for each --model.")
        return values * count if len(values) == 1 else values or [None] * count

    if not _PRICE_IN.value:
        return {}
    return {name: Price(*each) for name, *each in zip(_MODELS.value, *map(of_each, (_PRICE_IN, _PRICE_OUT, _PRICE_CACHED)), strict=True)}


def _config(subjects) -> Config:
    """Returns the configuration of --config, else that of the first model that is a run, with what flags say."""
    from sft_jax.hf.source import as_folder, is_run, run_config

    folders = [as_folder(subject.path) for subject in subjects.values()]
    runs = [folder for folder in folders if folder.is_dir() and is_run(folder)]
    path = next(iter(subjects.values())).path
    if cli.has_recipe(_CONFIG):
        config = cli.read_config(_CONFIG, needs_data=False, model=path)
    elif runs:
        config = cli.read_config_over(_CONFIG, run_config(runs[0]))
    else:
        raise UserError(
            "--config: is missing, and no --model is a run with a configuration of its own; name a recipe and the data, such as "
            "--config configs/sft.py --config.data.eval=held_out.jsonl --config.data.train=train.jsonl."
        )
    given = {"max_new_tokens": _MAX_NEW_TOKENS.value, "batch_size": _BATCH_SIZE.value, "scorers": tuple(_SCORERS.value) or None}
    changed = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, adapter=AdapterConfig(), eval=dataclasses.replace(config.eval, **changed))


def _out_folder() -> Path | None:
    """Returns the folder of --out, which is made where it is missing, so that hours of answers are not lost."""
    if _OUT.value is None:
        return None
    folder = Path(_OUT.value).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "samples.jsonl").touch()
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written to ({error.strerror}); name another folder.") from error
    return folder


def _write(folder: Path, comparison, found: dict) -> None:
    from sft_jax.comparison.samples_page import samples_page

    lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in comparison.records())
    texts = {
        "samples.jsonl": lines, "samples.html": samples_page(comparison),
        "results.json": json.dumps(found, ensure_ascii=False, allow_nan=False, indent=2) + "\n",
    }  # fmt: skip
    for name, text in texts.items():
        try:
            (folder / name).write_text(text, encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise UserError(f"--out: {folder / name} cannot be written ({error}).") from error
        _say(f"{folder / name}: written")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__)
