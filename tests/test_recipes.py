"""The recipes of popular models at full size: each one's training step is traced and lowered over its mesh, without devices.

What a recipe says of the machine is checked too: the state that every device holds for good leaves room for a step.
"""

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from sft_jax.config_parsing import parse_config
from sft_jax.errors import UserError
from sft_jax.hf.source import Source
from sft_jax.model.adapters import is_adapter
from sft_jax.model.sharding import abstract_mesh, named_leaves
from sft_jax.planning.program import make_programs

CONFIGS = Path(__file__).parents[1] / "configs"

MODELS = json.loads((CONFIGS.parent / "scripts" / "recipe_models.json").read_text())  # config.json by hub id
GB = 1e9


class Machine(NamedTuple):
    """What a recipe is for. `parameters` are those of the model as published."""

    parameters: float
    devices: int
    memory: float  # bytes of a device


RECIPES = {
    "llama3_2_1b_full": Machine(1.236e9, 1, 40 * GB),
    "qwen3_0_6b_full": Machine(0.596e9, 1, 24 * GB),
    "llama3_1_8b_full:v5e-64": Machine(8.03e9, 64, 16 * GB),
    "llama3_1_8b_full:v5p-16": Machine(8.03e9, 8, 95 * GB),
    "qwen3_30b_a3b_full": Machine(30.5e9, 32, 95 * GB),
    "llama3_1_8b_lora": Machine(8.03e9, 1, 80 * GB),
    "qwen3_8b_qlora": Machine(8.19e9, 1, 16 * GB),
    "gemma3_4b_lora": Machine(3.88e9, 8, 16 * GB),
    "llama3_3_70b_lora:v5p-32": Machine(70.6e9, 16, 95 * GB),
    "llama3_3_70b_lora:h200x8": Machine(70.6e9, 8, 141 * GB),
}


def load_recipe(name: str):
    """The recipe's module and what its get_config gives for the part after the colon."""
    file, _, arg = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    raw = module.get_config(arg) if arg else module.get_config()
    raw.data.train = "train.jsonl"
    return module, parse_config(raw)


def test_every_recipe_is_here():
    general = {"sft", "quickstart", "pretrain_nano"}
    assert {path.stem for path in CONFIGS.glob("*.py")} - general == {name.partition(":")[0] for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_is_in_the_docstring(name):
    module, _ = load_recipe(name)
    assert re.search(rf"python -m sft_jax\.train --config configs/{name.partition(':')[0]}\.py", module.__doc__)


@pytest.mark.parametrize("name", [name for name in RECIPES if ":" in name])
def test_an_unknown_machine_is_refused(name):
    file = name.partition(":")[0]
    with pytest.raises(UserError, match=f"configs/{file}.py:v4-8: the part after the colon is"):
        load_recipe(f"{file}:v4-8")


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_lowers_at_full_size(name):
    machine, (_, config) = RECIPES[name], load_recipe(name)
    mesh = abstract_mesh(1, machine.devices, 1)
    source = Source(config.model.path, json.dumps(MODELS[config.model.path]), None)
    programs = make_programs(config, source, mesh, log=print)
    state = programs.state
    held = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    of_model = [leaf for path, leaf in named_leaves((state.params, state.frozen)) if not is_adapter(path)]
    parameters = sum(math.prod(leaf.get_value().shape) * leaf.get_metadata().get("numbers", 1) for leaf in of_model)
    assert abs(parameters / machine.parameters - 1) < 0.02
    resident = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in held)
    assert resident < 0.6 * machine.memory, f"{resident / GB:.1f} GB of state on a device of {machine.memory / GB:.0f} GB"
    micro = config.train.micro_batch_size
    text = programs.train_step.trace(state, programs.batch).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in text  # layers are scanned
    tables = named_leaves((state.params, state.frozen))
    rows = next(leaf.shape[0] for path, leaf in tables if path.endswith("embed.embedding"))
    full = rf"tensor<{micro // machine.devices}x{config.data.max_length}x{rows}x"
    assert not re.search(full, text), "logits of all positions are formed"
