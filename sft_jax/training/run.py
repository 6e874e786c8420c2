"""A run from configuration to exported model, on one page. It composes and computes nothing.

The order matters: whatever can be wrong with the user's input is found before whatever is slow, and the state on disk
is always that of a step that was finished.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.checkpoint.checkpoints import Checkpoints
from sft_jax.checkpoint.processes import agree, anywhere
from sft_jax.config import Config, to_dict
from sft_jax.config_parsing import parse_config
from sft_jax.data.packing.pipeline import batches
from sft_jax.evaluation.evals import Evaluator
from sft_jax.evaluation.held_out_rows import slices_of
from sft_jax.evaluation.losses import Interrupted
from sft_jax.evaluation.scorers import find_scorers
from sft_jax.evaluation.step import make_eval_step
from sft_jax.hf.load import load_decoder
from sft_jax.hf.merged import plain
from sft_jax.hf.progress import LoadProgress
from sft_jax.hf.restore import model_source
from sft_jax.hf.source import ADAPTER, EXPORT
from sft_jax.model.sharding import make_mesh
from sft_jax.training import report
from sft_jax.training.adapting import check_export, with_new_adapters
from sft_jax.training.agreement import check_start
from sft_jax.training.best import Best
from sft_jax.training.composition import compose
from sft_jax.training.coordination import client
from sft_jax.training.export import export_adapter, export_state
from sft_jax.training.hardware import attention_pairs
from sft_jax.training.ledger import Ledger, cut_ledger_back, describe_documents
from sft_jax.training.loop import Hooks, train
from sft_jax.training.memory import memory_explained
from sft_jax.training.metrics import METRICS_FILE, MetricsLog, cut_logs_back
from sft_jax.training.movement import make_movement
from sft_jax.training.peers import Peers
from sft_jax.training.placement import check_length, check_rows, place_local, row_share
from sft_jax.training.platform import join_processes, set_up_platform
from sft_jax.training.prepare import prepare_on_all_processes
from sft_jax.training.profiler import Profiler
from sft_jax.training.progress import Phases, Progress
from sft_jax.training.remote_workdir import open_workdir
from sft_jax.training.replication import check_replication
from sft_jax.training.resolved import resolved
from sft_jax.training.signals import StopSignal
from sft_jax.training.start import find_start, restore_best
from sft_jax.training.state import abstract_state, base_arrays, create_state, saved_arrays
from sft_jax.training.step import make_train_step
from sft_jax.training.votes import Votes
from sft_jax.training.wandb_run import check_wandb
from sft_jax.training.watchdog import Watchdog
from sft_jax.training.window import Window
from sft_jax.training.workdir import Workdir
from sft_jax.versions import check_versions


def fit(config: Config | ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Fine-tunes a model and returns the summary, which is also WORKDIR/summary.json. The folder may be in gs:// or s3://.

    The same call continues a run that was stopped, exactly where its newest checkpoint is.

    Raises:
        UserError: the configuration, the data, the model or the folder is wrong; the message names what and the remedy.
        StoppedBySignal: SIGTERM, Ctrl-C or `train.stop_after_steps`; whatever there was to save is saved.
    """
    check_versions()
    given = config if isinstance(config, Config) else parse_config(config)
    config = resolved(given)
    phases = Phases()
    with contextlib.ExitStack() as stack:  # what is opened last is closed first: the lock outlives every save
        stop = stack.enter_context(StopSignal())
        set_up_platform(config.train.deterministic)
        join_processes(config.train.heartbeat_seconds)
        stack.enter_context(Peers(config.train.heartbeat_seconds))
        stop.at_once = client() is None  # several stop together
        check_start(given)
        work = agree(lambda: open_workdir(workdir, jax.process_index()))
        stack.enter_context(contextlib.closing(work))
        return _fit(config, work, stop, phases, stack)


def _fit(config: Config, work: Workdir, stop: StopSignal, phases: Phases, stack: contextlib.ExitStack) -> dict[str, Any]:
    first_process = jax.process_index() == 0
    micro_rows = config.train.micro_batch_size or config.train.batch_size
    eval_rows = config.eval.batch_size or micro_rows

    # ---- what can be refused at once
    mesh = make_mesh(**vars(config.mesh))
    check_length(mesh, config.data.max_length)
    check_rows(mesh, micro_rows, "train.micro_batch_size")
    check_rows(mesh, eval_rows, "eval.batch_size")
    base = agree(lambda: model_source(config.model.path))
    index, count = agree(lambda: row_share(mesh))
    composed = compose(config, base, mesh, log=report.say)
    options, source, abstract, adapters = composed.options, composed.source, composed.abstract, composed.adapters
    if adapters and config.train.export:
        agree(lambda: check_export(config, abstract, base))
    agree(lambda: find_scorers(config.eval.scorers, "eval.scorers"))
    Best(config)  # refuses a metric that is none
    agree(lambda: check_wandb() if config.log.wandb and first_process else None)

    # ---- where the run stands, and its data: every total is known before anything is trained
    checkpoints = stack.enter_context(Checkpoints(work.checkpoints, config.checkpoint.keep))
    start = find_start(config, work, checkpoints, log=report.say)
    start.check_model(abstract.spec)
    with phases("data"):
        data = prepare_on_all_processes(
            config, start.rows(config), abstract.spec.vocab_size, start.rendered_at, log=report.say
        )
    start.check_data(data)
    total_steps = start.total_steps(config, data)
    report.print_totals(config, data, start, total_steps)
    best = start.best(config)
    if start.finished(total_steps, best):
        report.print_finished(config, work, early=start.summary["steps"] < total_steps)
        return start.summary
    # Only the first process writes what is told apart by slices.
    slices = agree(lambda: slices_of(data.eval, config.data, config.eval.slices, "eval.slices") if first_process else {})
    votes = Votes(stop, mesh)
    votes.check()

    # ---- the model, or the state of the newest checkpoint
    with phases("model"), memory_explained(config, mesh, "loading the model"):
        optimizer = composed.optimizer(total_steps)
        graphdef, like = abstract_state(abstract, optimizer, mesh)
        check_replication(like, mesh, config.train.max_replicated)
        state = None if adapters else start.restore(like)
        if state is None:
            with LoadProgress(config.model.path, shown=first_process) as loaded:
                decoder = load_decoder(
                    config.model.path, options, mesh, config.model.dtype, init=config.model.init, seed=config.seed,
                    vocab_size=abstract.spec.vocab_size, progress=loaded, stored_as=config.adapter.base_dtype,
                )  # fmt: skip
            if decoder.source.ignored:
                report.say(f"Tensors of the checkpoint that hold no parameter: {', '.join(decoder.source.ignored)}.")
            decoder = plain(decoder)
            source = decoder.source
            if adapters:  # checkpoints hold everything but the base
                start.check_base(source, adapters)
                state = start.restore(like, base_arrays(like, decoder, adapters))
            if state is None:
                graphdef, state = create_state(with_new_adapters(decoder, config, adapters), optimizer, mesh)
            del decoder
    votes.check()
    evaluate_first = anywhere(first_process and start.must_evaluate(config, work, data.eval, total_steps, best))

    def write_start() -> None:
        work.remove("summary.json")  # of a run that had finished and goes on
        work.write_json("data_report.json", data.report)
        work.write_json("config.json", to_dict(config))
        work.write_json("manifest.json", report.run_manifest(config, data, source, mesh, optimizer))
        cut_logs_back(work, start.step if start.manifest else -1, evaluate_first)
        cut_ledger_back(work, start.step if start.manifest else -1)
        if config.log.ledger:
            describe_documents(work, data.train, data.row_fingerprints)
        work.publish()

    agree(lambda: write_start() if first_process else None)
    report.print_model(optimizer, like, abstract.spec, adapters, mesh)

    # ---- what happens between steps
    eval_step = votes.ride(make_eval_step(graphdef, mesh))
    evaluator = Evaluator(config, data, graphdef, eval_step, mesh, eval_rows, source, votes.stopping, slices)
    shown = stack.enter_context(contextlib.ExitStack())
    progress = shown.enter_context(Progress(total_steps, start.step, shown=first_process))
    ledger = Ledger(work, data.train, start.step, start.position) if config.log.ledger and first_process else None
    log = agree(lambda: MetricsLog(work, config, start.next_step) if first_process else None)
    shown.enter_context(log or contextlib.nullcontext())

    def evaluate(state, step: int) -> None:
        try:
            with phases("evaluate"), memory_explained(config, mesh, "evaluating"):
                results, samples = evaluator(state.averaged, step)
        except Interrupted:
            return  # the next start makes this evaluation
        finally:
            votes.count(0)
        best.add(step, results)
        with votes.deferred():
            if log is not None:
                log.write_samples(samples)  # before the values: where those are, all is
            for name, values in results.items():
                progress.print(report.eval_line(step, name, values))
                if log is not None:
                    log.write(step, name, values)
            if best.step == step:
                progress.print(f"step {step}  the best so far: {best}")

    def publish() -> None:
        if ledger is not None:
            ledger.write()
        work.publish()

    def save(state, step: int, position: int, window: Window) -> None:
        agree(lambda: publish() if first_process else None)  # logs first: those of later steps are cut back, missing ones are not made
        manifest = report.checkpoint_manifest(config, data, source, adapters, position, total_steps, window, best)
        with phases("checkpoint"):
            checkpoints.save(step, saved_arrays(state, adapters), manifest, best.steps)

    movement = make_movement(state.params, mesh)

    def begin_update(before):
        compare = movement(before.params)
        return lambda after: compare(after.params)

    hooks = Hooks(
        evaluate, save, checkpoints.check, partial(report.resume_point, checkpoints), partial(report.describe_rows, data.train),
        lambda batch: attention_pairs(batch, abstract.spec.layers) * count, ledger.add if ledger else lambda *_: None,
        begin_update, partial(report.used_data, data.train),
        lambda step: step in best.steps, lambda: best.ended,
    )  # fmt: skip

    # ---- train
    if evaluate_first:
        evaluate(state, start.step)
        votes.raise_failure()
    votes.check()
    stop.at_once = False
    steps = min(total_steps - start.step, config.train.stop_after_steps or total_steps)
    profiler = shown.enter_context(Profiler(work.path / "profile" if first_process else None, config.train.profile, steps))
    train_step = votes.ride(make_train_step(graphdef, optimizer, mesh, config.loss, config.log.ledger), donate=(0,))
    numbers = jax.device_put(optimizer.numbers, NamedSharding(mesh, P()))  # once, not with every step
    watchdog = Watchdog(work, f"stacks/process_{jax.process_index()}.txt", config.train.hang_seconds)
    with phases("train"), memory_explained(config, mesh, "training"), watchdog:
        outcome = train(
            state, start.step, start.position, total_steps,
            batches(data.train, start.position, config.train.batch_size, micro_rows, index, count),
            partial(place_local, mesh=mesh, batch_dim=1),
            lambda state, batch: train_step(state, batch, numbers),
            config, hooks, start.window(), log, progress, profiler, votes, watchdog,
        )  # fmt: skip

    def save_and_stop(by: str | None) -> None:
        if outcome.step > start.step:
            save(outcome.state, outcome.step, outcome.position, outcome.window)
            agree(checkpoints.wait)
        stop.raise_stopped(by)

    if outcome.step > start.step:
        stop.where = f"after step {outcome.step} of {total_steps}; the state is saved"
    if outcome.stopped:
        save_and_stop(outcome.stopped)

    # ---- what the run leaves behind
    exported_step = outcome.step
    if config.checkpoint.save_last and outcome.step > start.step:
        save(outcome.state, outcome.step, outcome.position, outcome.window)
    stop.at_once = jax.process_count() == 1 and checkpoints.last == outcome.step
    if data.eval and outcome.step > start.step and not outcome.ended_early and not votes.asked():
        evaluate(outcome.state, outcome.step)
        votes.raise_failure()
    if votes.asked():
        save_and_stop(None)
    if outcome.step in best.steps and outcome.step > start.step:
        save(outcome.state, outcome.step, outcome.position, outcome.window)
    with phases("checkpoint"):
        agree(checkpoints.wait)
        agree(lambda: checkpoints.prune(best.steps) if first_process else None)
    agree(shown.close)
    if outcome.ended_early:
        report.say(f"Ended early: {config.train.patience} evaluations in a row were no better than the best one. The best: {best}.")
    if config.train.export and best.step not in (None, outcome.step):
        report.say(f"What is exported is the best state: {best}.")
        kept = agree(lambda: restore_best(checkpoints, best.step, outcome.state, like, adapters))
        outcome.state, exported_step = kept, best.step
    exported = work.path / (ADAPTER if adapters else EXPORT) if config.train.export else None
    if exported is not None:
        export = export_adapter if adapters else export_state
        with phases("export"), memory_explained(config, mesh, "exporting"):
            compared = export(outcome.state.averaged, graphdef, config, data, source, exported, exported_step)
        report.say(f"Export, compared with the live model: {compared}.")
    stop.at_once = False
    summary = report.summary(
        outcome, phases.seconds, work.read_lines(METRICS_FILE), data.eval, abstract.spec, optimizer.choices, mesh, watchdog.dumps,
        best,
    )

    def write_end() -> None:
        if ledger is not None:
            ledger.write()
        work.write_json("summary.json", summary)
        if exported is not None:
            work.replace_folder(exported.name)
        work.publish()

    agree(lambda: write_end() if first_process else None)
    report.print_summary(summary, work, exported)
    return summary
