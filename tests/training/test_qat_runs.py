"""Runs with train.qat: what is evaluated is what a server makes of the export, which is the plain model."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from rounded_kernels import by_hand
from tiny_run import make_model, make_rows, tiny_config

import sft_jax
from sft_jax import fit
from sft_jax.errors import UserError
from sft_jax.model.adapters import block_projections
from sft_jax.model.sharding import is_variable, named_leaves, path_name
from sft_jax.training import run as run_lib

pytest.importorskip("qwix")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat_runs")
    config = make_model(folder / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    make_rows(folder / "train.jsonl")
    return folder


def config(folder, **changes):
    """Of runs that are evaluated on what they are trained on."""
    rows = {"held": str(folder / "train.jsonl")}
    return tiny_config(folder, **dict(train__epochs=6.0, train__export=True, data__eval=rows, checkpoint__every=0) | changes)


def told(summary, when: str = "eval_last") -> float:
    return summary[when]["held"]["loss"]


@pytest.mark.slow
def test_the_export_survives_what_it_was_trained_for(folder):
    """Rounding the export of a run with qat gives the loss that it has told; without, rounding costs. Also in bfloat16."""
    damage = {}
    for qat, rounding, dtype in (("", "int4", "float32"), ("int4", "int4", "float32"), ("int4", "int4", "bfloat16"), ("int8", "int8", "bfloat16")):
        place, work = folder / f"model_{dtype}", folder / f"run_{qat}_{dtype}"
        if not place.exists():
            shutil.copytree(folder / "model", place)
            values = json.loads((place / "config.json").read_text())
            values.pop("torch_dtype", None)
            (place / "config.json").write_text(json.dumps(values | {"dtype": dtype}))
        summary = fit(config(folder, train__qat=qat, model__path=str(place)), work)
        model, tokenizer = sft_jax.load(work / "export")
        assert model.runs[0][0].mlp.up.kernel[...].dtype == dtype
        # As a server has it, which rounds the kernels of the export; the rest as it was when the run told its loss.
        served = dict(named_leaves(by_hand(jax.tree.map(lambda x: x.astype(np.float32), model), rounding)))
        chosen = {f"{path}.kernel" for path, _ in block_projections(model)}
        rounded = jax.tree_util.tree_map_with_path(
            lambda path, leaf: served[path_name(path)] if path_name(path) in chosen else leaf, sft_jax.load(work)[0], is_leaf=is_variable
        )
        sft_jax.save(rounded, tokenizer, folder / f"rounded_{qat}_{dtype}")
        changes = dict(model__path=str(folder / f"rounded_{qat}_{dtype}"), model__init="checkpoint", train__steps=1, train__export=False)
        damage[qat, dtype] = told(fit(config(folder, **changes), folder / f"served_{qat}_{dtype}"), "eval_first") - told(summary)
        assert told(summary) < told(summary, "eval_first") - 1
    assert 1e-4 < damage.pop(("", "float32")) and all(abs(x) < 1e-5 for x in damage.values()), damage


def test_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(run_lib, "load_decoder", None)
    narrow = make_model(folder / "narrow") if not (folder / "narrow").exists() else folder / "narrow"
    with pytest.raises(UserError, match="train.qat: int4 has a scale for 32 inputs, which do not divide the 48 of runs.0.0.mlp.down; use int8"):
        fit(config(folder, train__qat="int4", model__path=str(narrow)), folder / "refused")
    with pytest.raises(UserError, match="train.qat: rounds the kernels that are trained, and with adapter.name=lora none is"):
        fit(config(folder, train__qat="int8", adapter__name="lora"), folder / "refused")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "qwix" else found(name, *rest))
    with pytest.raises(UserError, match=r"train.qat: the package qwix is not installed; run pip install 'sft_jax\[qat\]'"):
        fit(config(folder, train__qat="int8"), folder / "refused")
