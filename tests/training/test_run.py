"""The run as a whole: what it leaves behind, what it refuses, and what it does when something goes wrong."""

import collections
import itertools
import json
import math
import re
import shutil
import time
from functools import partial

import jax
import numpy as np
import pytest
from tiny_models import ALL_CONFIGS
from tiny_run import make_rows, metrics, tiny_config

import sft_jax
from sft_jax import fit
from sft_jax.checkpoint import checkpoints as checkpoints_lib
from sft_jax.checkpoint import manifest as manifest_lib
from sft_jax.config_parsing import parse_config
from sft_jax.data.prepare import prepare
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.model.families import spec_from_config
from sft_jax.model.sharding import make_mesh
from sft_jax.training import run as run_lib
from sft_jax.training.groups import Choice
from sft_jax.training.hardware import training_flops
from sft_jax.training.memory import advice, memory_explained
from sft_jax.training.placement import check_rows
from sft_jax.training.report import matmul_parameters, sample_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder):
    """A short run with evaluation, generations, export and TensorBoard, in rows that are cut over devices."""
    config = tiny_config(
        folder, mesh__context=2, train__steps=5, train__export=True, data__eval={"held": str(folder / "held_out.jsonl")}, eval__every=2,
        eval__generate=4, eval__max_new_tokens=8, log__every=2, log__tensorboard=True, checkpoint__keep=1,
    )  # fmt: skip
    return fit(config, folder / "finished"), folder / "finished"


def test_what_a_run_leaves_behind(finished):
    summary, workdir = finished
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "manifest.json", "metrics.jsonl", "tensorboard", "data_report.json", "samples.jsonl",
            "checkpoints", "export", "summary.json"} <= names  # fmt: skip
    assert json.loads((workdir / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["finished"] and summary["steps"] == 5 and summary["rows"] == 40
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["5"]
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "context": 2, "tensor": 1} and manifest["versions"]["jax"] == jax.__version__
    assert any((workdir / "tensorboard").iterdir())


def test_a_tokenizer_of_another_model_is_refused_before_the_model_is_loaded(folder, monkeypatch):
    config = tiny_config(folder)
    small = folder / "small"
    shutil.copytree(folder / "model", small)
    values = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(values | {"vocab_size": 40}))
    config.model.path = str(small)
    monkeypatch.setattr(run_lib, "load_decoder", None)
    with pytest.raises(UserError, match=rf"train\.jsonl:1: token .* has the id \d+, and the model {small} .*below 40"):
        fit(config, folder / "another_tokenizer")


def test_evaluation_happens_at_the_start_every_n_steps_and_at_the_end(finished):
    _, workdir = finished
    held = [record for record in metrics(workdir) if record["split"] == "held"]
    assert [record["step"] for record in held] == [0, 2, 4, 5]
    assert held[-1]["loss"] < held[0]["loss"]
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 4 + [2] * 4 + [4] * 4 + [5] * 4
    assert {"prompt", "reference", "generation", "exact_match"} <= samples[0].keys()


def test_windows_of_the_log_are_sums(finished):
    """Steps 1-2, 3-4 and 5: every step is in one record, and real tokens add up to those of the rows."""
    _, workdir = finished
    trained = [record for record in metrics(workdir) if record["split"] == "train"]
    assert [record["step"] for record in trained] == [2, 4, 5]
    report = json.loads((workdir / "data_report.json").read_text())
    assert sum(record["real_tokens"] for record in trained) == report["train"]["stream"]["tokens"]
    epochs = [record["epoch"] for record in trained]
    assert epochs == sorted(epochs) and 0 < epochs[0] < epochs[-1]
    whole = report["train"]["stream"]["rows_of_each_epoch"]
    firsts = itertools.accumulate(whole, initial=0)  # row of the stream with which an epoch begins
    assert epochs[-1] == pytest.approx(sum(min(max(40 - first, 0), rows) / rows for first, rows in zip(firsts, whole, strict=False)))


@pytest.mark.slow
def test_the_log_counts_what_each_data_set_has_given(folder):
    """Against what the batches hold up to each position, in a run that was stopped between two records and continued."""
    tiny_config(folder)
    sets = {"many": {"path": str(folder / "train.jsonl"), "epochs": 0.5}, "few": {"path": str(folder / "held_out.jsonl"), "epochs": 2, "cap": 5}}
    config = tiny_config(folder, data__train=sets, train__steps=7, log__every=2, train__stop_after_steps=3)
    with pytest.raises(StoppedBySignal):
        fit(config, folder / "counts")
    config.train.stop_after_steps = 0
    summary = fit(config, folder / "counts")
    resolved = parse_config(config)
    stream = prepare(resolved.data, model_path=resolved.model.path, rows=7 * 8).train
    records = [record for record in metrics(folder / "counts") if record["split"] == "train"]
    assert [record["step"] for record in records] == [2, 4, 6, 7]
    for record in records:
        batch = stream.read(0, record["step"] * 8)
        documents, supervised = collections.Counter(), collections.Counter()
        for row, segment in zip(*np.nonzero(batch.examples >= 0), strict=True):
            name = stream.identity(batch.examples[row, segment])[0]
            documents[name] += 1
            supervised[name] += int((batch.weights[row, batch.segments[row] == segment + 1] > 0).sum())
        for name in sets:
            assert (record[f"data/{name}/documents"], record[f"data/{name}/supervised_tokens"]) == (documents[name], supervised[name])
    planned = json.loads((folder / "counts" / "data_report.json").read_text())["train"]["stream"]["sets"]
    assert {name: part["documents"] for name, part in planned.items()} == documents
    assert {name: part["supervised_tokens"] for name, part in planned.items()} == supervised
    assert planned["few"]["epochs"] == documents["few"] / 5 and summary["train"]["data/few/documents"] == documents["few"]


def test_the_export_is_the_trained_model(finished):
    _, workdir = finished
    model, tokenizer = sft_jax.load(workdir)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    step = checkpoints_lib.committed_steps(workdir / "checkpoints")[-1]
    arrays = checkpoints_lib.read_manifest(workdir / "checkpoints" / str(step))["arrays"]
    assert sum(int(np.prod(shape)) for name, (shape, _, _) in arrays.items() if name.startswith("params/")) == sum(
        leaf.size for leaf in jax.tree.leaves(model)
    )
    assert np.isfinite(np.asarray(model(tokens))).all() and tokenizer.chat_template


def test_a_new_run_from_a_run(folder, finished):
    """`model.path` = workdir: its weights, a fresh optimizer, a schedule of its own."""
    summary, workdir = finished
    config = tiny_config(folder, model__path=str(workdir), model__init="checkpoint", train__steps=2, data__eval={"held": str(folder / "held_out.jsonl")})
    again = fit(config, folder / "from_run")
    assert again["eval_first"]["held"]["loss"] == pytest.approx(summary["eval_last"]["held"]["loss"], rel=1e-5)
    assert again["steps"] == 2


def test_a_relative_base_is_found_from_anywhere(folder, finished, monkeypatch):
    """A run records where its model lies, and continues under either spelling but not with another model."""
    monkeypatch.chdir(folder)
    config = tiny_config(folder, model__path="model", train__stop_after_steps=1, train__steps=2)
    with pytest.raises(StoppedBySignal):
        fit(config, folder / "relative")
    assert json.loads((folder / "relative/config.json").read_text())["model"]["path"] == str(folder / "model")
    monkeypatch.chdir("/")
    assert sft_jax.load(folder / "relative")[0].source.provenance.base == str(folder / "model")
    config.model.path = str(folder / "model")
    config.train.stop_after_steps = 0
    model_config = (folder / "model/config.json").read_text()
    (folder / "model/config.json").write_text(json.dumps({**json.loads(model_config), "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match="model.path: its config.json describes another model"):
        fit(config, folder / "relative")
    (folder / "model/config.json").write_text(model_config)
    assert fit(config, folder / "relative")["steps"] == 2


@pytest.mark.slow
def test_a_new_run_from_a_run_has_its_chat_template(folder):
    """Also from one that was stopped and has no export: the rows are those of a run that names the template itself."""
    with pytest.raises(StoppedBySignal):
        fit(tiny_config(folder, train__stop_after_steps=1, data__chat_template="zephyr", data__max_length=192), folder / "templated")
    go_on = {"model__path": str(folder / "templated"), "model__init": "checkpoint", "data__max_length": 192, "train__steps": 1}
    fit(tiny_config(folder, **go_on), folder / "goes_on")
    fit(tiny_config(folder, **go_on, data__chat_template="zephyr"), folder / "named")
    fit(tiny_config(folder, train__steps=1, data__max_length=192), folder / "other_template")
    found = [json.loads((folder / name / "data_report.json").read_text())["fingerprints"] for name in ("goes_on", "named", "other_template")]
    assert found[0] == found[1] and found[0]["tokens"] != found[2]["tokens"]
    again = fit(tiny_config(folder, **go_on), folder / "goes_on")  # the same command finds its own run
    assert again["finished"]


def test_totals_are_printed_before_training(folder, finished, capsys):
    with pytest.raises(StoppedBySignal):
        fit(tiny_config(folder, train__stop_after_steps=1), folder / "totals")
    lines = capsys.readouterr().out.splitlines()
    totals = next(i for i, line in enumerate(lines) if line.startswith("Training data: "))
    assert "real tokens" in lines[totals] and "supervised" in lines[totals]
    assert totals < next(i for i, line in enumerate(lines) if line.startswith("step 1/"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__batch_size": 12}, "train.micro_batch_size: 12 rows do not divide over mesh.data=1 x mesh.fsdp=8"),
        ({"mesh__tensor": 3}, "mesh.tensor=3"),
        ({"model__remat": "ful"}, "model.remat.*'full'"),
        ({"model__remat": "offload"}, "model.remat: offload .* use full"),
        ({"model__attention": "slash"}, "model.attention.*'splash'"),
        ({"model__attention": "splash"}, "model.attention: 'splash' runs on tpu only"),
        ({"mesh__context": 4, "data__max_length": 100}, "data.max_length: 100 is not divisible by 8.*choose 96 or 104"),
        ({"mesh__expert": 2}, "mesh.expert: .* has no experts to cut"),
        ({"optim__name": "adam"}, "optim.name.*'adamw'"),
        ({"optim__schedule": "cosin"}, "optim.schedule.*'cosine'"),
        ({"optim__groups": [{"pattern": "no_such_parameter", "freeze": True}]}, "no_such_parameter.*matches no parameter"),
        ({"data__chat_template": "chatmll"}, "chatml"),
        ({"data__format": "shargpt"}, "'sharegpt'"),
        ({"data__supervise": "asistant"}, "supervise"),
    ],
)
def test_wrong_values_are_refused_with_their_key(folder, changes, words):
    with pytest.raises(UserError, match=words):
        fit(tiny_config(folder, **changes), folder / "refused")


def test_a_step_that_is_not_finite_aborts_and_names_its_rows(folder):
    config = tiny_config(folder, optim__learning_rate=1e30, optim__warmup=0.0, optim__clip_norm=0.0, optim__schedule="constant")
    with pytest.raises(UserError, match=r"step \d+: the loss or a gradient is not finite.*train.jsonl:\d+.*train.nonfinite=skip.*"
                       "The same command continues (after step 2, its newest checkpoint|at the beginning)"):
        fit(config, folder / "nonfinite")
    for step in checkpoints_lib.committed_steps(folder / "nonfinite/checkpoints"):
        checkpoints_lib.verify(folder / "nonfinite/checkpoints" / str(step))


def test_steps_that_are_not_finite_can_be_left_out(folder):
    config = tiny_config(
        folder, train__steps=4, train__nonfinite="skip", optim__learning_rate=1e30, optim__warmup=0.0, optim__clip_norm=0.0,
        optim__schedule="constant",
    )  # fmt: skip
    summary = fit(config, folder / "skipped")
    assert summary["finished"] and 0 < summary["nonfinite_steps"] < 4
    for name in ("metrics.jsonl", "summary.json"):
        text = (folder / "skipped" / name).read_text()
        [json.loads(part, parse_constant=pytest.fail) for part in (text.splitlines() if name.endswith("l") else [text])]


def test_every_loss_but_that_of_the_first_step_has_its_rate(folder, monkeypatch, capsys):
    """Also those of the last steps, whose metrics are fetched all at once: no step took less time than it took."""
    loop, least = run_lib.train, 0.05  # seconds of a step, at least

    def with_slow_steps(*arguments):
        before, (step, *after) = arguments[:6], arguments[6:]

        def slow_step(state, batch):
            time.sleep(least)
            return jax.block_until_ready(step(state, batch))

        return loop(*before, slow_step, *after)

    monkeypatch.setattr(run_lib, "train", with_slow_steps)
    summary = fit(tiny_config(folder, train__steps=12, train__epochs=7.0), folder / "rates")
    records = [json.loads(line) for line in (folder / "rates/metrics.jsonl").read_text().splitlines()]
    rates = [record.get("real_tokens_per_second") for record in records]
    assert rates[0] is None and all(rates[1:]) and len(rates) == 12
    seconds = [record["real_tokens"] / rate for record, rate in zip(records[1:], rates[1:], strict=True)]
    assert sum(seconds) == pytest.approx(summary["seconds_per_step"] * 11)
    assert summary["seconds"]["first_step"] > least and min(seconds) > least * 0.99
    first_line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/"))
    assert "tokens/s" not in first_line and "left" not in first_line


def test_epochs_that_steps_win_over_are_told(folder, capsys):
    with pytest.raises(StoppedBySignal):
        fit(tiny_config(folder, train__steps=3, train__epochs=9.0, train__stop_after_steps=1), folder / "epochs")
    assert "train.epochs=9 is not used" in capsys.readouterr().out


def test_frozen_kernels_cost_less(folder):
    spec = spec_from_config(ALL_CONFIGS["granite"])  # 99 tokens in 128 rows
    shapes = {"runs.0.0.mlp.up.kernel": (3, 5), "runs.0.0.norm.scale": (5,), "embed.embedding": (128, 3)}
    choice = partial(Choice, pattern="", learning_rate=1.0, weight_decay=0.0, matrix=True)
    choices = [choice(path, shape, frozen="mlp" in path, parameters=math.prod(shape)) for path, shape in shapes.items()]
    assert matmul_parameters(choices, spec) == (297, 15)
    experts = [choice("runs.0.1.mlp.up.kernel", (2, 8, 3, 5), frozen=False, parameters=2 * 8 * 3 * 5)]
    assert matmul_parameters(experts, spec_from_config(ALL_CONFIGS["qwen2_moe"])) == (2 * 3 * 3 * 5, 0)  # 3 of 8 are used
    assert training_flops(21, 15, 0, 10, 0) == 10 * (6 * 21 + 4 * 15)


def test_whatever_is_open_is_closed_before_the_lock_goes(folder, monkeypatch):
    """Else the next start would meet a writer, or the user a terminal without a cursor."""
    closed = []
    for owner, name in ((run_lib.Progress, "progress"), (run_lib.MetricsLog, "log"), (run_lib.Profiler, "profiler"), (run_lib.Checkpoints, "checkpoints")):
        leave = owner.__exit__
        monkeypatch.setattr(owner, "__exit__", lambda self, *error, leave=leave, name=name: (closed.append(name), leave(self, *error))[1])
    unlock = run_lib.Workdir.close
    monkeypatch.setattr(run_lib.Workdir, "close", lambda self: (closed.append("lock"), unlock(self)))

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(run_lib, "train", broken)
    with pytest.raises(ZeroDivisionError):
        fit(tiny_config(folder, train__steps=2), folder / "closing")
    assert closed == ["profiler", "log", "progress", "checkpoints", "lock"]


def test_frozen_parameters_stay_bit_equal(folder, capsys):
    groups = [{"pattern": "embed", "freeze": True}, {"pattern": "mlp", "learning_rate": 0.1}]
    fit(tiny_config(folder, train__steps=1, optim__groups=groups), folder / "frozen1")
    fit(tiny_config(folder, train__steps=3, optim__groups=groups), folder / "frozen3")
    assert "frozen" in capsys.readouterr().out
    arrays = [checkpoints_lib.read_manifest(folder / f"frozen{n}/checkpoints/{n}")["arrays"] for n in (1, 3)]
    assert arrays[0].keys() == arrays[1].keys()
    same = {name for name in arrays[0] if arrays[0][name] == arrays[1][name]}
    assert same == {name for name in arrays[0] if name.startswith("frozen/")} and same
    assert not any("embed" in name for name in arrays[0] if name.startswith("opt_state/"))


def test_a_full_disk_while_saving_ends_the_run(folder, monkeypatch):
    def full(path, body):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_lib, "write_manifest", full)
    with pytest.raises(UserError, match="checkpoints.*no space left.*start the same command again"):
        fit(tiny_config(folder), folder / "full_disk")


def test_out_of_memory_is_one_message(folder, monkeypatch):
    def exhausted(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1.5G")

    monkeypatch.setattr(run_lib, "train", exhausted)
    with pytest.raises(UserError, match=r"Out of memory while training \(allocating 1.5G\).*train.micro_batch_size=4 \(now 8"):
        fit(tiny_config(folder, mesh__fsdp=4, mesh__tensor=2), folder / "memory")


def test_advice_leaves_out_what_is_done_and_what_would_be_refused(folder):
    mesh = make_mesh(2, 2, 2)

    def told(doing, **changes):
        config = parse_config(tiny_config(folder, train__batch_size=24, **changes))
        text = advice(config, mesh, doing)
        for key, value in re.findall(r"([a-z_]+\.[a-z_]+)=(\w+) \(now \d+", text):  # what is proposed is accepted
            section, _, name = key.partition(".")
            raw = tiny_config(folder, train__batch_size=24, **changes)
            raw[section][name] = int(value)
            parse_config(raw)
            check_rows(mesh, int(value), key)
        return text

    done = told("training", model__remat="full", train__micro_batch_size=4, optim__name="adafactor", optim__b2=0.999)
    assert "micro_batch" not in done and "remat" not in done and "adafactor" not in done  # 2 rows do not divide over the mesh
    assert "train.micro_batch_size=12 (now 24" in told("training") and "along one of mesh.fsdp (now 2), mesh.tensor (now 2), mesh.context (now 1)" in told("training")
    assert "train.micro_batch_size=8 (now 12" in told("training", train__micro_batch_size=12)
    assert "base_dtype=nf4" not in told("training") + told("training", adapter__name="lora", adapter__base_dtype="nf4")
    assert "adapter.base_dtype=nf4" in told("loading the model", adapter__name="lora", adapter__base_dtype="int8")
    held_out = {"data__eval": str(folder / "held_out.jsonl")}
    assert "eval.batch_size=12 (now 24" in told("evaluating", **held_out)
    assert "eval.batch_size=4 (now 8" in told("evaluating", eval__batch_size=8, **held_out)
    for doing in ("evaluating", "exporting", "loading the model"):
        assert "micro_batch_size" not in told(doing, **held_out) and "remat" not in told(doing, **held_out)
    with pytest.raises(jax.errors.JaxRuntimeError), memory_explained(parse_config(tiny_config(folder)), mesh, "training"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_out_of_memory_while_exporting_is_one_message(folder, monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(run_lib, "export_state", exhausted)
    with pytest.raises(UserError, match="Out of memory while exporting.*sft_jax.export"):
        fit(tiny_config(folder, train__steps=1, train__export=True), folder / "memory_export")


def test_a_data_error_in_the_middle_never_ends_as_success(folder, monkeypatch):
    from sft_jax.data.packing.pipeline import RowStream

    read = RowStream.read

    def failing(self, first, count):
        if first >= 16:
            raise OSError("the disk went away")
        return read(self, first, count)

    monkeypatch.setattr(RowStream, "read", failing)
    with pytest.raises(Exception, match="the disk went away"):
        fit(tiny_config(folder), folder / "data_error")
    assert not (folder / "data_error/summary.json").exists()


def test_profile_writes_a_trace(folder):
    fit(tiny_config(folder, train__steps=2, train__profile=3), folder / "profiled")  # fewer steps than asked for
    assert list((folder / "profiled/profile").rglob("*.xplane.pb"))


def test_rows_of_many_lengths_have_a_count(folder):
    long = make_rows(folder / "long.jsonl", 20, seed=3)
    config = tiny_config(folder, data__train=str(long), data__max_length=24, data__overlength="drop", train__steps=1, train__batch_size=8)
    fit(config, folder / "dropped")
    report = json.loads((folder / "dropped/data_report.json").read_text())["train"]["sets"]["train"]
    assert report["rows_read"] == 20
    assert report["documents"] < report["examples"], report["over_length"]


def test_the_end_of_a_run_shows_answers_before_and_after(finished):
    _, workdir = finished
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    lines = sample_lines(samples, count=2)
    assert [line for line in lines if not line.startswith("  ")] == [
        f"held, {sample['example']['file']}:{sample['example']['line']}" for sample in samples[:2]
    ]
    shown = [line.split(":", 1)[1].strip().removesuffix(" ...") for line in lines if line.startswith("  ")]
    first, last = samples[0], samples[-4]
    assert last["step"] == 5 and last["example"] == first["example"]
    for text, wanted in zip(shown[:4], (first["prompt"], first["reference"], first["generation"], last["generation"]), strict=True):
        assert text == wanted.replace("\n", "\\n")[:160].strip()
