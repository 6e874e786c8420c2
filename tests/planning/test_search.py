"""The search for the fastest settings, with the compiler's word on them; and what it prints, pasted."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
from tiny_models import ALL_CONFIGS
from tiny_plans import MODEL, tiny_config, write_model

from sft_jax.errors import UserError
from sft_jax.planning import planner
from sft_jax.planning.machines import CHIPS, machine
from sft_jax.planning.program import has_tpu_compiler
from sft_jax.planning.remedies import with_settings
from sft_jax.planning.search import overrides, rows_and_heads, search

needs_libtpu = pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed (pip install 'sft_jax[tpu]')")
ROOT = Path(__file__).parents[2]


@needs_libtpu
@pytest.mark.slow
def test_what_is_found_is_compiled_and_fits(tmp_path, monkeypatch):
    """On chips with so little memory that the largest micro-batch does not fit: the plans that are given do, and once more when
    what is printed of them is set by hand, without a compilation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plans"))
    config = tiny_config(write_model(tmp_path / "model", hidden_size=256, intermediate_size=1024), train__batch_size=32)
    base = planner.base_of(config)
    whole = with_settings(config, {"model.remat": "none", "train.micro_batch_size": 32})
    roomy = planner.make_plan(whole, machine("v5e-4"), base, estimated=True, log=lambda text: None)
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=0.6 * roomy.needed))
    said: list[str] = []
    plans = search(config, machine("v5e-4"), base, tokens=1e6, estimated=False, log=said.append)
    compiled = [text for text in said if text.startswith("compiling")]
    assert plans and len(compiled) >= len(plans)
    assert [plan.roofline.seconds for plan in plans] == sorted(plan.roofline.seconds for plan in plans)
    for plan in plans:
        assert plan.fits and not plan.estimated and plan.needed <= CHIPS["v5e"].memory
        assert not (plan.config.model.remat == "none" and plan.config.train.micro_batch_size == 32)
    kept = len(list((tmp_path / "plans").rglob("*.json")))
    again = planner.make_plan(with_settings(config, overrides(plans[0])), machine("v5e-4"), base, log=lambda text: None)
    assert again.train == plans[0].train and len(list((tmp_path / "plans").rglob("*.json"))) == kept


@pytest.mark.slow
def test_the_printed_flags_are_a_plan(tmp_path):
    """The command itself, its JSON, and what it says pasted into another command."""
    model = write_model(tmp_path / "model")
    command = [
        sys.executable, "-m", "sft_jax.plan", "--config", "configs/sft.py", f"--config.model.path={model}", "--config.train.batch_size=16",
        "--config.data.max_length=256", "--topology", "h100x4", "--tokens", "1e6",
    ]  # fmt: skip
    found = json.loads(subprocess.run([*command, "--auto", "--json"], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    text = subprocess.run([*command, "--auto"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    flags = next(line for line in text.splitlines() if line.startswith("Best: ")).removeprefix("Best: ").split()
    assert flags == [f"--config.{key}={value}" for key, value in found["settings"].items()]
    pasted = json.loads(subprocess.run([*command, *flags, "--json"], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert (pasted["mesh"], pasted["needed_bytes"], pasted["roofline"]) == (found["mesh"], found["needed_bytes"], found["roofline"])


def quiet(config, name: str) -> list:
    return search(config, machine(name), planner.base_of(config), tokens=1e8, estimated=True, log=lambda text: None)


def test_a_batch_that_divides_over_no_layout_is_named(tmp_path):
    """With the nearest that does and is not refused: four key heads do not divide over `tensor=8`, so 64 devices are 16 groups."""
    config = tiny_config(write_model(tmp_path / "model", num_key_value_heads=4, hidden_size=256), train__batch_size=9, train__micro_batch_size=0)
    with pytest.raises(UserError, match=r"^train\.batch_size: 9 rows divide over the 64 devices of v5e-64 in no layout .* choose 16, "):
        quiet(config, "v5e-64")
    nearest = with_settings(config, {"train.batch_size": 16})
    assert {one.mesh["tensor"] for one in quiet(nearest, "v5e-64")} == {4}


def test_where_every_layout_is_refused_the_reason_is_told(tmp_path):
    config = tiny_config(write_model(tmp_path / "model", hidden_size=125))
    with pytest.raises(UserError, match=r"^--auto: no layout of h100x4 can run this\. Of the first: .*'embed' of size 125"):
        quiet(config, "h100x4")
    with pytest.raises(UserError, match=r"^mesh\.context=3: does not divide the 4 devices of h100x4"):
        quiet(with_settings(config, {"mesh.context": 3}), "h100x4")


def test_the_command_has_one_message_where_nothing_can_run(tmp_path):
    model = write_model(tmp_path / "model")
    flags = ["--config", "configs/sft.py", f"--config.model.path={model}", "--topology", "v6e-256", "--auto", "--estimate", "--tokens", "1e8"]
    done = commands.run("plan", *flags, env=os.environ, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: train.batch_size: 8 rows divide over the 256 devices of v6e-256 in no layout")


def test_long_rows_find_context(tmp_path):
    """One row of 128k tokens does not fit a device's memory whole; a batch of 4 has none for most of 32 devices otherwise."""
    model = write_model(tmp_path / "model", hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4)
    config = tiny_config(model, data__max_length=131072, train__batch_size=4, train__micro_batch_size=4)
    begun = time.process_time()
    best = quiet(config, "h100x32")[0]
    assert time.process_time() - begun < 120
    assert best.fits and best.mesh["context"] > 1 and overrides(best)["mesh.context"] == best.mesh["context"]
    short = tiny_config(model, data__max_length=4096, train__batch_size=32, train__micro_batch_size=32)
    assert {mesh["context"] for mesh in rows_and_heads(short, machine("v5p-64"))} == {1}


def test_a_mixture_finds_expert(tmp_path):
    """Most of its parameters are those of experts, of which a token reads two: to gather them all costs more than to send tokens."""
    base = {**ALL_CONFIGS["qwen2_moe"], "num_experts": 16, "hidden_size": 256, "moe_intermediate_size": 1024, "num_hidden_layers": 4}
    config = tiny_config(write_model(tmp_path / "model", base=base), train__batch_size=8, train__micro_batch_size=8)
    begun = time.process_time()
    plans = quiet(config, "h100x8")
    assert time.process_time() - begun < 120
    assert plans[0].mesh["expert"] > 1 and plans[0].fits
    assert {one.mesh["expert"] for one in plans} >= {1, 2, 4, 8}


def test_offload_is_chosen_where_memory_is_short_and_waits_for_the_host(tmp_path, monkeypatch):
    """What blocks read leaves the device, at the speed of its link to the host's memory."""
    config = tiny_config(write_model(tmp_path / "model", num_hidden_layers=32), data__max_length=4096, train__batch_size=4, train__micro_batch_size=4)
    plans = {one.config.model.remat: one for one in quiet(config, "h100x4") if one.mesh["fsdp"] == 4}
    assert plans.keys() == {"none", "dots", "full", "offload"}
    states = 4096 * MODEL["hidden_size"] * 2 * 32  # of a device's row, in bfloat16, of all layers
    assert plans["offload"].roofline.host == 2 * states / CHIPS["h100"].host and plans["full"].roofline.host == 0
    assert plans["offload"].needed < plans["full"].needed < plans["none"].needed
    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(CHIPS["h100"], memory=(plans["offload"].needed + plans["full"].needed) / 2))
    least = [one for one in quiet(config, "h100x4") if one.mesh["fsdp"] == 4]
    assert least and {one.config.model.remat for one in least} == {"offload"}


def test_pasted_flags_evaluate_as_the_plan_did(tmp_path):
    """Where there are held-out data, how many of their rows fit at a time belongs to the plan."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    config = tiny_config(write_model(tmp_path / "model"), data__eval=str(rows))
    plan = search(config, machine("h100x4"), planner.base_of(config), tokens=1e6, estimated=True, log=lambda text: None)[0]
    assert overrides(plan)["eval.batch_size"] == plan.config.eval.batch_size
