"""Runs whose base is quantised: adapters alone are trained and saved, and the base is quantised again wherever it is read."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from random_batches import random_batch
from tiny_models import random_decoder
from tiny_run import final_checksums, make_base, metrics, tiny_config

import sft_jax
from sft_jax import fit
from sft_jax.config import OptimConfig
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.hf.export import export_checkpoint
from sft_jax.model.adapters import adaptable, is_adapter, plan_adapters
from sft_jax.model.attach import attach, merge
from sft_jax.model.quantise import quantise
from sft_jax.model.sharding import named_leaves
from sft_jax.training import run as run_lib
from sft_jax.training.optim import make_optimizer
from sft_jax.training.report import matmul_parameters, parameter_counts, stored_kernels
from sft_jax.training.state import abstract_state, create_state
from sft_jax.training.step import make_train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data of tiny runs and "base", a model that has weights."""
    folder = tmp_path_factory.mktemp("quantised_runs")
    make_base(folder)
    return folder


def config(folder, **changes):
    given = dict(
        adapter__name="lora", adapter__rank=4, adapter__alpha=8.0, adapter__base_dtype="nf4", adapter__train=["final_norm"],
        model__path=str(folder / "base"), model__init="checkpoint", train__steps=5, mesh__data=8, mesh__fsdp=1,
        data__eval={"held": str(folder / "held_out.jsonl")},
    )  # fmt: skip
    return tiny_config(folder, **given | changes)


def held_out(summary, when: str = "eval_last") -> float:
    return summary[when]["held"]["loss"]


@pytest.fixture(scope="module")
def finished(folder):
    return fit(config(folder, train__export=True), folder / "finished"), folder / "finished"


@pytest.mark.slow
def test_checkpoints_hold_neither_codes_nor_scales(finished):
    summary, workdir = finished
    arrays = final_checksums(workdir)["arrays"]
    params = {name.removeprefix("params/").replace("/", ".") for name in arrays if name.startswith("params/")}
    assert all(is_adapter(path) or path == "final_norm.scale" for path in params) and len(params) == 15
    assert not any("codes" in name or "scales" in name for name in arrays)
    assert held_out(summary) < held_out(summary, "eval_first") - 0.1


def test_a_run_is_its_quantised_base_with_its_adapters(folder, finished):
    """What `load` gives has the quantised kernels and the loss that the run has told; merged it is a plain model of that loss."""
    summary, workdir = finished
    model, tokenizer = sft_jax.load(workdir)
    assert model.runs[0][0].mlp.up.kernel.stored_as == "nf4"
    merged = merge(model)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    np.testing.assert_allclose(model(tokens), merged(tokens), atol=1e-5)
    attached, plain = (sft_jax.generate(m, tokenizer, ["lamp", "rain at noon"], max_new_tokens=4) for m in (model, merged))
    assert attached == plain
    report = export_checkpoint(model, tokenizer, folder / "merged")
    assert report.parameters == sum(leaf.size for leaf in jax.tree.leaves(merged)) and report.logit_difference < 1e-5
    again = fit(
        config(folder, adapter__name="none", adapter__base_dtype="", adapter__rank=16, adapter__alpha=32.0, adapter__train=[],
               model__path=str(folder / "merged"), train__steps=1), folder / "of_merged",
    )  # fmt: skip
    assert held_out(again, "eval_first") == pytest.approx(held_out(summary), rel=1e-5)


@pytest.mark.slow
def test_the_adapter_is_written_as_always(folder, finished):
    """As a directory of PEFT, which others put on the base as it is; here it is the run's model again, quantised base and all."""
    _, workdir = finished
    model, _ = sft_jax.load(workdir)
    again, _ = sft_jax.load(workdir / "adapter")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    np.testing.assert_allclose(again(tokens), model(tokens), atol=1e-5)
    shutil.copytree(workdir / "adapter", folder / "for_others")
    (folder / "for_others/sft_jax.json").unlink()
    on_plain, _ = sft_jax.load(folder / "for_others", base=folder / "base")
    assert not any("codes" in path for path, _ in named_leaves(on_plain))
    for (path, ours), (_, theirs) in zip(adaptable(model), adaptable(on_plain), strict=True):
        if ours.adapter is not None:
            np.testing.assert_array_equal(ours.adapter.change(), theirs.adapter.change(), err_msg=path)
    changes = dict(adapter__path=str(workdir / "adapter"), adapter__rank=16, adapter__alpha=32.0, adapter__train=[], train__steps=1)
    with pytest.raises(UserError, match="adapter.base_dtype: is '', but the adapter in .* was trained on a base stored as 'nf4'"):
        fit(config(folder, **changes, adapter__base_dtype=""), folder / "on_plain")
    again = fit(config(folder, **changes), folder / "from_adapter")
    assert held_out(again, "eval_first") == pytest.approx(held_out(finished[0]), rel=1e-5)


@pytest.mark.slow
def test_stopped_and_continued_is_never_stopped(folder, finished):
    _, workdir = finished
    again = folder / "stopped"
    with pytest.raises(StoppedBySignal):
        fit(config(folder, train__stop_after_steps=3), again)
    fit(config(folder), again)
    assert final_checksums(again) == final_checksums(workdir)
    assert metrics(again) == metrics(workdir)
    with pytest.raises(UserError, match="adapter.base_dtype: was 'nf4' when this run began and is 'int8' now"):
        fit(config(folder, train__steps=6, adapter__base_dtype="int8"), again)


def test_a_run_from_a_run_merges_before_it_quantises(folder, finished):
    """A base that is itself a run with adapters on a quantised base."""
    summary, workdir = finished
    again = fit(config(folder, model__path=str(workdir), adapter__base_dtype="int8", train__steps=1), folder / "from_run")
    assert held_out(again, "eval_first") == pytest.approx(held_out(summary), abs=0.01)


@pytest.mark.slow
def test_on_a_mesh_that_blocks_do_not_fit(folder, finished):
    """Kernels of one block on eight devices: the same run."""
    again = fit(config(folder, mesh__data=1, mesh__fsdp=4, mesh__tensor=2), folder / "other_mesh")
    assert held_out(again) == pytest.approx(held_out(finished[0]), rel=1e-4)


def test_a_kernel_that_an_adapter_brings_whole_cannot_lie_on_a_quantised_base(folder, monkeypatch):
    trained = dict(adapter__base_dtype="", adapter__train=["mlp.down"], adapter__targets=["query"], train__steps=1, train__export=True)
    fit(config(folder, **trained), folder / "whole_kernel")
    monkeypatch.setattr(run_lib, "load_decoder", None)
    path = folder / "whole_kernel/adapter/sft_jax.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_dtype": "nf4"}))
    changes = dict(adapter__path=str(folder / "whole_kernel"), adapter__rank=16, adapter__alpha=32.0, adapter__train=[])
    with pytest.raises(UserError, match="adapter.train: runs.0.0.mlp.down.kernel is trained whole, but it is quantised"):
        fit(config(folder, **changes), folder / "refused")


@pytest.mark.slow
def test_a_run_without_a_checkpoint_is_its_adapter_on_the_quantised_base(folder, finished):
    work = folder / "no_checkpoint"
    fit(config(folder, train__export=True, checkpoint__every=0, checkpoint__save_last=False), work)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    np.testing.assert_allclose(sft_jax.load(work)[0](tokens), sft_jax.load(finished[1])[0](tokens), atol=1e-5)


# ---- the step


def state_of(decoder):
    settings = dict(name="adamw", learning_rate=0.1, schedule="constant", warmup=0.0)
    optimizer = make_optimizer(OptimConfig(**settings), nnx.state(decoder), 10, adapters=decoder.adapters)
    return optimizer, *create_state(decoder, optimizer)


def test_codes_have_no_gradient_and_no_optimizer_state_and_stay():
    decoder = quantise(random_decoder("gpt_oss"), "nf4")
    decoder = attach(decoder, plan_adapters(decoder, name="lora", rank=2, alpha=4), jax.random.key(0))
    before = {path: np.asarray(leaf[...]) for path, leaf in named_leaves(decoder) if not is_adapter(path)}
    optimizer, graphdef, state = state_of(decoder)
    assert {path for path, _ in named_leaves(state.params)} == {path for path, _ in named_leaves(decoder) if is_adapter(path)}
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * trained
    batch = jax.tree.map(lambda x: np.stack([x, x]), random_batch(4, 24))
    state, result = make_train_step(graphdef, optimizer)(state, batch)
    assert result["grad_norm"] > 0 and not result["nonfinite"]
    for path, leaf in named_leaves(state.frozen):
        np.testing.assert_array_equal(leaf[...], before[path], err_msg=path)


def test_parameters_are_counted_as_those_of_the_model():
    """Not the bytes in which they are stored: in the report, and in the work of a step."""
    base = random_decoder("qwen2_moe")
    plan = plan_adapters(base, name="lora", rank=2, alpha=4)
    counts = {}
    for name, decoder in (("plain", base), ("nf4", quantise(base, "nf4")), ("int8", quantise(base, "int8"))):
        decoder = attach(decoder, plan, jax.random.key(0))
        optimizer = make_optimizer(OptimConfig(), nnx.state(decoder), 10, adapters=decoder.adapters)
        counts[name] = parameter_counts(optimizer.choices), matmul_parameters(optimizer.choices, decoder.spec)
        _, state = abstract_state(decoder, optimizer)
        count, size = stored_kernels(state)
        kernels = [leaf for path, leaf in named_leaves(decoder) if ".kernel.codes" in path]
        assert count == sum(leaf[...].size * {"nf4": 2, "int8": 1}[name] for leaf in kernels)
        assert size >= count * {"plain": 0, "nf4": 0.5, "int8": 1}[name]
    assert counts["plain"] == counts["nf4"] == counts["int8"]
