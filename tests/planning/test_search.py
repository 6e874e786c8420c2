"""The search for the fastest settings, with the compiler's word on them; and what it prints, pasted."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_plans import tiny_config, write_model

from sft_jax.planning import planner
from sft_jax.planning.machines import CHIPS, machine
from sft_jax.planning.program import has_tpu_compiler
from sft_jax.planning.remedies import with_settings
from sft_jax.planning.search import overrides, search

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


def test_pasted_flags_evaluate_as_the_plan_did(tmp_path):
    """Where there are held-out data, how many of their rows fit at a time belongs to the plan."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    config = tiny_config(write_model(tmp_path / "model"), data__eval=str(rows))
    plan = search(config, machine("h100x4"), planner.base_of(config), tokens=1e6, estimated=True, log=lambda text: None)[0]
    assert overrides(plan)["eval.batch_size"] == plan.config.eval.batch_size
