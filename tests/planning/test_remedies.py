"""What a plan that does not fit is told to change: whoever does has a run that is accepted and fits."""

import dataclasses
import json

import pytest
from check_estimates import _8B, _EXPERTS, _LORA, Case, configured
from slow_values import slow
from tiny_plans import tiny_config, write_model

from sft_jax.config import to_dict
from sft_jax.planning import planner, report
from sft_jax.planning.machines import CHIPS, GIB, cpu, machine
from sft_jax.planning.program import has_tpu_compiler
from sft_jax.planning.remedies import remedies, with_settings

_70B = "meta-llama/Llama-3.3-70B-Instruct"
IMPOSSIBLE = {
    "too many rows at a time": Case("", _8B, 32, "h100x8", {"data.max_length": 4096, "train.batch_size": 512, "model.remat": "none"}),
    "copies": Case("", _8B, 32, "h100x8", {"model.dtype": "bfloat16", "mesh.data": 8, "mesh.fsdp": 1, "data.max_length": 4096}),
    "a long row": Case("", _8B, 32, "h100x8", {**_LORA, "data.max_length": 131072, "train.batch_size": 8, "model.remat": "dots"}),
    "the state": Case("", _70B, 80, "h100x8", {"data.max_length": 4096, "train.batch_size": 32}),
    "one GPU": Case("", _8B, 32, "a100x1", {"data.max_length": 4096, "train.batch_size": 8}),
    "a small slice": Case("", _8B, 32, "v5e-8", {"data.max_length": 4096, "train.batch_size": 64}),
    "experts": Case("", _EXPERTS, 48, "v5e-16", {"data.max_length": 4096, "train.batch_size": 64, "train.micro_batch_size": 16}),
}  # fmt: skip


def followed(plan, base, remedy):
    """Returns the plan of the run once a remedy has been followed."""
    config = with_settings(plan.config, remedy.settings)
    return planner.make_plan(config, remedy.machine, base, estimated=True, log=lambda text: None, plain=remedy.plain)


@pytest.mark.parametrize("case", ["copies", "one GPU", *slow(*(name for name in IMPOSSIBLE if name not in ("copies", "one GPU")))])
def test_whoever_follows_one_has_a_run_that_fits(case, tmp_path):
    case = IMPOSSIBLE[case]
    config = configured(case, tmp_path)
    base = planner.base_of(config)
    plan = planner.make_plan(config, machine(case.topology), base, estimated=True, log=lambda text: None)
    assert not plan.fits
    found = remedies(plan, base)
    assert found
    for remedy in found:
        then = followed(plan, base, remedy)
        assert then.fits and then.needed == remedy.needed, remedy
        assert then.needed <= 0.9 * then.machine.chip.memory  # an estimate can be a tenth off
    keeps = [remedy for remedy in found if "result stays the same" in remedy.told and remedy.machine == plan.machine]
    trained = [remedy for remedy in found if {"model.dtype", "adapter.name", "optim.name", "data.max_length"} & remedy.settings.keys()]
    assert not (keeps and trained)  # nobody is told to train otherwise without need
    told = "\n".join(report.lines(plan, 0.5, None, found))
    assert "DOES NOT FIT" in told and all(remedy.flags(plan) in told for remedy in found)
    assert json.loads(json.dumps(report.to_dict(plan, 0.5, None, found)))["remedies"][0]["settings"] == found[0].settings


def test_the_fewest_changes_are_told(tmp_path):
    """Where fewer rows at a time are enough, no more is said, and they are as many as fit."""
    case = IMPOSSIBLE["too many rows at a time"]
    config = with_settings(configured(case, tmp_path), {"model.remat": "full"})
    base = planner.base_of(config)
    plan = planner.make_plan(config, machine(case.topology), base, estimated=True, log=lambda text: None)
    first = remedies(plan, base)[0]
    assert set(first.settings) == {"train.micro_batch_size"} and first.settings["train.micro_batch_size"] % 8 == 0
    more = with_settings(config, {"train.micro_batch_size": 2 * first.settings["train.micro_batch_size"]})
    needed = planner.make_plan(more, plan.machine, base, estimated=True, log=lambda text: None).needed
    assert needed > 0.9 * plan.machine.chip.memory


def test_a_layer_gathered_ahead_is_what_does_not_fit(tmp_path, monkeypatch):
    """Then the first thing told is to do without."""
    config = configured(Case("", _8B, 32, "v5e-16", {**_LORA, "data.max_length": 4096, "train.batch_size": 16}), tmp_path)
    base = planner.base_of(config)
    with_flags, without = (
        planner.make_plan(config, machine("v5e-16"), base, estimated=True, log=lambda text: None, plain=plain).needed for plain in (False, True)
    )
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=without / 0.89))
    assert without / 0.89 < with_flags
    plan = planner.make_plan(config, machine("v5e-16"), base, estimated=True, log=lambda text: None)
    first = remedies(plan, base)[0]
    assert (first.settings, first.plain, first.needed) == ({}, True, without) and followed(plan, base, first).fits
    assert first.flags(plan) == "--plain" and "SFT_JAX_OVERLAP=0" in first.told
    assert first.to_dict(plan)["environment"] == {"SFT_JAX_OVERLAP": "0"}


def test_a_host_with_more_memory(tmp_path):
    config = tiny_config(write_model(tmp_path))
    base = planner.base_of(config)
    plan = planner.make_plan(config, cpu(0.5), base, estimated=True, log=lambda text: None)
    found = remedies(plan, base)
    assert not plan.fits and found[-1].flags(plan).startswith("--memory-gib ")
    assert followed(plan, base, found[-1]).fits


def test_settings_are_parsed_as_those_of_a_recipe(tmp_path):
    config = tiny_config(write_model(tmp_path))
    assert with_settings(config, {}) == config
    changed = with_settings(config, {"adapter.name": "lora", "mesh.fsdp": -1})
    assert to_dict(changed)["adapter"]["name"] == "lora"
    assert dataclasses.replace(changed, adapter=config.adapter, mesh=config.mesh) == config


@pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed (pip install 'sft_jax[tpu]')")
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"model__remat": "none"}, {"mesh__data": 4}], ids=["rows", "copies"])
def test_what_fits_by_estimate_is_compiled_and_fits(tmp_path, monkeypatch, settings):
    """On a slice of chips with less memory than there are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plans"))
    model = write_model(tmp_path / "wide", hidden_size=512, intermediate_size=2048, vocab_size=8192)
    config = tiny_config(model, train__batch_size=32, train__micro_batch_size=32, train__max_replicated=1.0, **settings)
    base = planner.base_of(config)
    full = planner.make_plan(config, machine("v5e-4"), base, log=lambda text: None)
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=0.75 * full.needed))
    plan = planner.make_plan(config, machine("v5e-4"), base, log=lambda text: None)
    found = remedies(plan, base)
    assert not plan.fits and found[0].machine == plan.machine
    assert planner.make_plan(with_settings(config, found[0].settings), plan.machine, base, log=lambda text: None).fits


def test_memory_of_a_cpu_is_given_or_the_hosts():
    assert machine("cpu", 3.0).chip.memory == 3 * GIB and machine("cpu").chip.memory > GIB
    assert machine("cpu").devices == 1 and machine("cpu").describe().startswith("cpu: one device of ")
