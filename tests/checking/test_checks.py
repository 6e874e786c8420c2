"""The contracts of selfcheck hold of a sound run, on a mesh and with adapters, and each fails where its fault is planted."""

import json
import os
import signal

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_run import ROOT, as_flags, environment, make_base, tiny_config

from sft_jax.checking import computing, running
from sft_jax.checking.checks import CONTRACTS, STATEMENTS, Bench, check
from sft_jax.checking.subject import fullest_rows, open_subject
from sft_jax.config import to_dict
from sft_jax.config_parsing import parse_config
from sft_jax.diagnosis.run_files import read_run
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.model.decoder import Decoder
from sft_jax.training import contracts, step
from sft_jax.training.signals import STOP_AFTER_STEPS, StopSignal

RUNS = ("resume", "integrity", "export")


def subject_of(folder, **changes):
    base = folder / "base" if (folder / "base").is_dir() else make_base(folder)
    changes = {"train__export": True, "model__path": str(base), "model__init": "checkpoint", **changes}
    return open_subject(parse_config(tiny_config(folder, **changes)), log=lambda message: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def small(folder):
    """All parameters, rows over eight devices; nothing else is cut."""
    return subject_of(folder, mesh__data=8)


@pytest.fixture(scope="module")
def small_runs(small, folder):
    return Bench(small, folder / "runs").runs


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"adapter__name": "lora", "adapter__rank": 4, "adapter__init": "pissa", "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, id="pissa", marks=pytest.mark.slow),
        pytest.param({"mesh__data": 1, "mesh__fsdp": 4, "mesh__context": 2}, id="context", marks=pytest.mark.slow),
        pytest.param({"adapter__name": "dora", "adapter__rank": 4, "mesh__fsdp": 8, "model__compute_dtype": "bfloat16"}, id="dora", marks=pytest.mark.slow),
    ],
)
def test_all_contracts_hold(folder, tmp_path, changes):
    subject = subject_of(folder, **changes)
    # An adapter cannot learn much of words behind a head that was drawn at random.
    names = [name for name in CONTRACTS if name != "overfitting" or "adapter__name" not in changes]
    outcomes = {outcome.contract: outcome for outcome in check(subject, names, tmp_path)}
    assert list(outcomes) == names
    assert not [outcome for outcome in outcomes.values() if outcome.state == "FAILS"]
    unchecked = {name for name, outcome in outcomes.items() if outcome.not_checked}
    assert unchecked == (set() if "adapter__name" in changes else {"adapters", "merging"})
    assert subject.documents > 1 and outcomes["packing"].error > 0  # something was compared


def same_segment(self, tokens, positions, segments, *args, **kwargs):
    return HIDDEN(self, tokens, positions, jnp.minimum(segments, 1), *args, **kwargs)


HIDDEN, ACCUMULATE, EVAL_STEP, CROSS_ENTROPY = Decoder.hidden, step._accumulate, contracts.make_eval_step, contracts.cross_entropy


def added_twice(grad_fn, state, batch, *rest):
    gradient, loss = ACCUMULATE(grad_fn, state, batch, *rest)
    return jax.tree.map(lambda g: g * batch.tokens.shape[0], gradient), loss


def means_of_batches(*args):
    run = EVAL_STEP(*args)

    def mean(state, batch):
        loss = run(state, batch)
        return loss._replace(nll=loss.nll / jnp.maximum(loss.weight, 1), weight=jnp.float32(1))

    return mean


def a_little_more(*args, **kwargs):
    sums = CROSS_ENTROPY(*args, **kwargs)
    return sums._replace(total=sums.total * 1.001)


FAULTS = {
    "documents see each other": ("isolation", Decoder, "hidden", same_segment),
    "documents see each other, packed": ("packing", Decoder, "hidden", same_segment),
    "micro-batches are added twice": ("accumulation", step, "_accumulate", added_twice),
    "means of batches are averaged": ("evaluation", contracts, "make_eval_step", means_of_batches),
    "the chunked loss is off": ("chunking", contracts, "cross_entropy", a_little_more),
}


@pytest.mark.parametrize("fault", [pytest.param(name, marks=[] if name == "documents see each other" else pytest.mark.slow) for name in FAULTS])
def test_a_fault_in_what_is_computed_is_found(small, monkeypatch, fault):
    name, place, attribute, wrong = FAULTS[fault]
    monkeypatch.setattr(place, attribute, wrong)
    assert getattr(computing, name)(small).state == "FAILS"


@pytest.mark.slow
def test_faults_of_layout_and_adapters_are_found(folder, monkeypatch):
    subject = subject_of(folder, adapter__name="lora", adapter__rank=4, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    subject.alone = computing._moved(subject.decoder, 5)  # as if it were read otherwise on one device
    assert computing.layout(subject).state == "FAILS"
    monkeypatch.setattr(computing, "merge", lambda decoder: subject.base)
    assert computing.merging(subject).state == "FAILS"
    subject.decoder = computing._moved(subject.decoder, 5)
    assert computing.adapters(subject).state == "FAILS"


def test_a_batch_that_is_not_learned_is_found(small, monkeypatch):
    assert running.overfitting(small).state == "holds"
    run = small.run
    monkeypatch.setattr(small, "run", run.__class__(**{**vars(run), "optim": run.optim.__class__(**{**vars(run.optim), "learning_rate": 1e-9})}))
    outcome = running.overfitting(small, steps=3)
    assert outcome.state == "FAILS" and "learning rate (1e-09)" in outcome.hint


@pytest.mark.slow
def test_runs_hold_and_what_is_changed_on_disk_is_found(small, small_runs, monkeypatch):
    assert [outcome.state for outcome in (running.resume(small_runs), running.integrity(small_runs), running.export(small, small_runs))] == ["holds"] * 3
    monkeypatch.setattr(running, "verify", lambda folder: None)
    assert running.integrity(small_runs).error == 3
    (weights,) = (small_runs.whole / "export").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(weights)
    name = next(name for name in tensors if "q_proj" in name)
    safetensors.numpy.save_file({**tensors, name: tensors[name] * 1.01}, weights, metadata={"format": "pt"})
    assert running.export(small, small_runs).state == "FAILS"


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("late", [False, True])
def test_a_signal_in_a_short_run_ends_the_check_and_says_what_is_kept(small, tmp_path, monkeypatch, place, late):
    """In the first run, in the one that is to stop by itself, and in its second start; also where a run has ended before it noticed."""
    calls = []

    def fit(config, path):
        calls.append(path.name)
        with StopSignal() as stop:
            stop.at_once = False
            if len(calls) == place:
                os.kill(os.getpid(), signal.SIGTERM)
                if late:
                    return
                stop.raise_stopped()
            if config.train.stop_after_steps:
                stop.raise_stopped(STOP_AFTER_STEPS)

    monkeypatch.setattr(running, "fit", fit)
    with pytest.raises(StoppedBySignal, match="Stopped by a signal in the short runs, which are removed with their folder"):
        list(check(small, ["resume"]))
    assert len(calls) == place
    calls.clear()
    with pytest.raises(StoppedBySignal, match="Stopped by SIGTERM"):
        list(check(small, ["resume"], tmp_path))


@pytest.mark.slow
def test_a_resume_that_starts_the_data_again_is_found(small, tmp_path, monkeypatch):
    from sft_jax.training import run

    batches = run.batches
    monkeypatch.setattr(run, "batches", lambda stream, first, *rest: ((first + row, batch) for row, batch in batches(stream, 0, *rest)))
    outcome = running.resume(Bench(small, tmp_path).runs)
    assert outcome.state == "FAILS" and "arrays and steps that differ: " in outcome.quantity


def test_the_short_runs_can_be_read_as_other_runs_are(small, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(running.short(small.run, export=True))))
    (tmp_path / "metrics.jsonl").touch()
    assert read_run(tmp_path).config.log.wandb == ""


def test_rows_with_most_documents_are_taken(small):
    batch = fullest_rows(small.data.train, 4)
    documents = small.data.train.read(0, min(64, small.data.train.total_rows)).segments.max(axis=1)
    assert sorted(batch.segments.max(axis=1)) == sorted(np.sort(documents)[-4:])
    assert fullest_rows(small.data.train, 4).tokens.shape == (4, 96)


def test_every_contract_has_a_statement_and_a_wrong_name_is_told(small):
    assert all(STATEMENTS[name] for name in CONTRACTS)
    with pytest.raises(UserError, match="--only: 'pakcing' is no contract.*packing"):
        list(check(small, ["pakcing"]))


def test_several_processes_are_refused_at_once(folder):
    job = {"JAX_COORDINATOR_ADDRESS": "localhost:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    flags = [f"--config={ROOT / 'configs/sft.py'}", *as_flags(tiny_config(folder))]
    result = commands.run("selfcheck", *flags, env={**environment(1, folder / "xdg"), **job})
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert result.stderr.startswith("error: Several processes were started; a selfcheck is one process") and result.stderr.count("\n") == 1


def test_the_command(folder):
    """One object on standard output, or a table; exit code 3 where something fails, 2 for wrong input."""
    config = tiny_config(folder, optim__learning_rate=1e-9)

    def run(*arguments, **options):
        flags = [f"--config={ROOT / 'configs/sft.py'}", *as_flags(config), *arguments]
        return commands.run("selfcheck", *flags, env=environment(1, folder / "xdg"), **options)

    result = run("--only=isolation,overfitting,layout", "--json", terminal=True)
    assert result.returncode == 3, result.stderr
    answer = json.loads(result.stdout)
    assert [(one["contract"], one["state"]) for one in answer["contracts"]] == [("isolation", "holds"), ("layout", "not checked"), ("overfitting", "fails")]
    assert answer["holds"] is False
    commands.assert_bar(result)
    assert all(f"{done}/3" in result.stderr for done in range(3)) and "contracts: overfitting" in result.stderr
    result = run("--only=isolation")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr and "\u2501" not in result.stderr
    assert "isolation    holds" in result.stdout and "All contracts that could be checked hold." in result.stdout
    result = run("--only=isolatoin")
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: --only: 'isolatoin' is no contract")
