"""A run from configuration to exported model, on one page. It composes and computes nothing.

The order matters: whatever can be wrong with the user's input is found before whatever is slow, and the state on disk
is always that of a step that was finished.
"""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
from flax import nnx

from sft_jax.checkpoint.checkpoints import Checkpoints, flatten_state
from sft_jax.config import Config, parse_config, to_dict
from sft_jax.data.pipeline import batches
from sft_jax.errors import StoppedBySignal
from sft_jax.evaluation.evals import Evaluator
from sft_jax.hf.load import abstract_decoder, load_decoder
from sft_jax.hf.source import find_model, lasting_path, read_source
from sft_jax.model.options import Options
from sft_jax.model.sharding import constrain_fn, make_mesh
from sft_jax.training import report
from sft_jax.training.export import export_state
from sft_jax.training.hardware import attention_pairs
from sft_jax.training.loop import Hooks, train
from sft_jax.training.memory import memory_explained
from sft_jax.training.metrics import METRICS_FILE, MetricsLog, Phases, Progress
from sft_jax.training.optim import make_optimizer
from sft_jax.training.placement import check_rows, place_local, row_share
from sft_jax.training.platform import join_processes, set_up_platform
from sft_jax.training.prepare import prepare_on_all_processes
from sft_jax.training.signals import StopSignal
from sft_jax.training.start import find_start
from sft_jax.training.state import abstract_state, create_state
from sft_jax.training.step import make_eval_step, make_train_step
from sft_jax.training.workdir import Workdir
from sft_jax.versions import check_versions

SAMPLES_FILE = "samples.jsonl"


def fit(config: Config | ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Fine-tunes a model and returns the summary, which is also WORKDIR/summary.json.

    The same call continues a run that was stopped, exactly where its newest checkpoint is.

    Raises:
        UserError: the configuration, the data, the model or the folder is wrong; the message names what and the remedy.
        StoppedBySignal: SIGTERM, Ctrl-C or `train.stop_after_steps`; the state is saved.
    """
    check_versions()
    config = config if isinstance(config, Config) else parse_config(config)
    model = dataclasses.replace(config.model, path=lasting_path(config.model.path))
    config = dataclasses.replace(config, model=model)
    set_up_platform(config.train.deterministic)
    join_processes()
    with contextlib.closing(Workdir(workdir, lock=jax.process_index() == 0)) as work, StopSignal() as stop:
        return _fit(config, work, stop)


def _fit(config: Config, work: Workdir, stop: StopSignal) -> dict[str, Any]:
    phases = Phases()
    first_process = jax.process_index() == 0
    micro_rows = config.train.micro_batch_size or config.train.batch_size
    eval_rows = config.eval.batch_size or micro_rows

    # ---- what can be refused at once
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_rows(mesh, micro_rows, "train.micro_batch_size")
    check_rows(mesh, eval_rows, "eval.batch_size")
    options = Options(
        compute_dtype=config.model.compute_dtype, precision=config.model.matmul_precision, remat=config.model.remat,
        attention=config.model.attention, constrain=constrain_fn(mesh),
    )  # fmt: skip
    source = read_source(find_model(config.model.path), config.model.path)
    abstract = abstract_decoder(source, options, mesh, config.model.dtype)
    make_optimizer(config.optim, nnx.state(abstract), total_steps=2**31)

    # ---- where the run stands, and its data: every total is known before anything is trained
    checkpoints = Checkpoints(work.path / "checkpoints", config.checkpoint.keep)
    start = find_start(config, work, checkpoints, log=report.say)
    start.check_model(abstract.spec)
    with phases("data"):
        data = prepare_on_all_processes(
            config, start.rows(config), abstract.spec.vocab_size, start.rendered_at, log=report.say
        )
    start.check_data(data)
    total_steps = start.total_steps(config, data)
    report.print_totals(config, data, start, total_steps)
    if start.finished(total_steps):
        report.say(f"This run has finished. Its summary is {work.path / 'summary.json'}; raise train.epochs to extend it.")
        return start.summary

    # ---- the model, or the state of the newest checkpoint
    with phases("model"), memory_explained(config, "loading the model"):
        optimizer = make_optimizer(config.optim, nnx.state(abstract), total_steps, seed=config.seed)
        graphdef, like = abstract_state(abstract, optimizer, mesh)
        state = start.restore(like)
        if state is None:
            decoder = load_decoder(
                config.model.path, options, mesh, config.model.dtype, init=config.model.init, seed=config.seed
            )
            if decoder.source.ignored:
                report.say(f"Tensors of the checkpoint that hold no parameter: {', '.join(decoder.source.ignored)}.")
            graphdef, state = create_state(decoder, optimizer, mesh)
            del decoder
    if first_process:
        work.write_json("data_report.json", data.report)
        work.write_json("config.json", to_dict(config))
        work.write_json("manifest.json", report.run_manifest(config, data, source, mesh, optimizer))
        for name in (METRICS_FILE, SAMPLES_FILE):
            work.cut_back(name, start.step if start.manifest else -1)  # a run that never saved begins anew, step 0 too
    report.print_model(optimizer, like, mesh)

    # ---- what happens between steps
    log = MetricsLog(work, config.log.tensorboard, start.step + 1) if first_process else None
    progress = Progress(total_steps, start.step, shown=first_process)
    evaluator = Evaluator(config, data, graphdef, make_eval_step(graphdef, mesh), mesh, eval_rows, source)

    def evaluate(state, step: int) -> None:
        with phases("evaluate"), memory_explained(config, "evaluating"):
            results, samples = evaluator(state, step)
        for name, values in results.items():
            progress.print(report.eval_line(step, name, values))
            if log is not None:
                log.write(step, name, values)
        if first_process and samples:
            work.append_lines(SAMPLES_FILE, samples)

    def save(state, step: int, position: int) -> None:
        with phases("checkpoint"):
            checkpoints.save(step, flatten_state(state), report.checkpoint_manifest(config, data, source, position, total_steps))

    index, count = row_share(mesh)
    hooks = Hooks(
        evaluate, save, checkpoints.check, partial(report.describe_rows, data.train),
        lambda batch: attention_pairs(batch, abstract.spec.layers) * count,
    )  # fmt: skip

    # ---- train
    if start.step == 0 and data.eval:
        evaluate(state, 0)
    with memory_explained(config, "training"):
        outcome = train(
            state, start.step, start.position, total_steps,
            batches(data.train, start.position, config.train.batch_size, micro_rows, index, count),
            partial(place_local, mesh=mesh, batch_dim=1),
            make_train_step(graphdef, optimizer, mesh),
            config, hooks, log, progress, stop,
        )  # fmt: skip
    if outcome.stopped:
        progress.close()
        save(outcome.state, outcome.step, outcome.position)
        checkpoints.close()
        raise StoppedBySignal(
            f"Stopped by {outcome.stopped} after step {outcome.step} of {total_steps}; the state is saved. "
            "Start the same command again to continue."
        )

    # ---- what the run leaves behind
    if data.eval:
        evaluate(outcome.state, outcome.step)
    progress.close()
    if config.checkpoint.save_last:
        save(outcome.state, outcome.step, outcome.position)
    with phases("checkpoint"):
        checkpoints.close()
    if config.train.export:
        with phases("export"):
            export_state(outcome.state, graphdef, config, data, source, work.path / "export", outcome.step)
    summary = report.summary(outcome, phases.seconds, evaluator.history, abstract.spec, optimizer.choices, mesh)
    if first_process:
        work.write_json("summary.json", summary)
        log.close()
    report.print_summary(summary, work, exported=config.train.export)
    return summary
