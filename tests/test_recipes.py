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
import numpy as np
import pytest
from flax import nnx
from published_configs import published_config

from sft_jax.batch import Batch
from sft_jax.config import parse_config
from sft_jax.errors import UserError
from sft_jax.hf.load import abstract_decoder
from sft_jax.hf.source import Source
from sft_jax.model.adapters import is_adapter
from sft_jax.model.options import Options
from sft_jax.model.quantise import quantise
from sft_jax.model.sharding import abstract_mesh, batch_sharding, constrain_fn, named_leaves
from sft_jax.training.adapting import adapters_of, with_new_adapters
from sft_jax.training.model_checks import check_model_options
from sft_jax.training.optim import make_optimizer
from sft_jax.training.replication import check_replication
from sft_jax.training.state import abstract_state
from sft_jax.training.step import make_train_step

CONFIGS = Path(__file__).parents[1] / "configs"

_LLAMA31 = {
    **published_config("LlamaForCausalLM"), "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "head_dim": 128, "tie_word_embeddings": False,
    "rope_scaling": {**published_config("LlamaForCausalLM")["rope_scaling"], "factor": 8.0},
}  # fmt: skip
MODELS = {  # config.json by hub id
    "meta-llama/Llama-3.2-1B": published_config("LlamaForCausalLM"),
    "meta-llama/Llama-3.1-8B": _LLAMA31,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA31,
    "meta-llama/Llama-3.3-70B-Instruct": {
        **_LLAMA31, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "Qwen/Qwen3-0.6B": {
        **published_config("Qwen3ForCausalLM"), "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": published_config("Qwen3ForCausalLM"),
    "Qwen/Qwen3-30B-A3B": published_config("Qwen3MoeForCausalLM"),
    "google/gemma-3-4b-it": published_config("Gemma3ForConditionalGeneration"),
}  # fmt: skip
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


def abstract_run(config, mesh):
    """The state of the recipe's run in shapes and shardings, and its training step."""
    options = Options(
        compute_dtype=config.model.compute_dtype, precision=config.model.matmul_precision, remat=config.model.remat,
        attention=config.model.attention, constrain=constrain_fn(mesh),
    )  # fmt: skip
    source = Source(config.model.path, json.dumps(MODELS[config.model.path]), None)
    decoder = abstract_decoder(source, options, mesh, config.model.dtype)
    if config.adapter.base_dtype:
        decoder = quantise(decoder, config.adapter.base_dtype)
    adapters = adapters_of(config, decoder, source)
    decoder = with_new_adapters(decoder, config, adapters)
    check_model_options(config, decoder.spec)
    optimizer = make_optimizer(config.optim, nnx.state(decoder), total_steps=1000, seed=config.seed, adapters=adapters)
    graphdef, state = abstract_state(decoder, optimizer, mesh)
    return state, make_train_step(graphdef, optimizer, mesh, config.loss)


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_lowers_at_full_size(name):
    machine, (_, config) = RECIPES[name], load_recipe(name)
    mesh = abstract_mesh(1, machine.devices, 1)
    state, step = abstract_run(config, mesh)
    check_replication(state, mesh, config.train.max_replicated)
    held = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    of_model = [leaf for path, leaf in named_leaves((state.params, state.frozen)) if not is_adapter(path)]
    parameters = sum(math.prod(leaf.get_value().shape) * leaf.get_metadata().get("numbers", 1) for leaf in of_model)
    assert abs(parameters / machine.parameters - 1) < 0.02
    resident = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in held)
    assert resident < 0.6 * machine.memory, f"{resident / GB:.1f} GB of state on a device of {machine.memory / GB:.0f} GB"
    micro = config.train.micro_batch_size
    shape = (config.train.batch_size // micro, micro, config.data.max_length)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, 1))

    batch = Batch(
        tokens=array(np.int32, *shape), targets=array(np.int32, *shape), weights=array(np.float32, *shape),
        segments=array(np.int32, *shape), positions=array(np.int32, *shape),
        examples=array(np.int32, *shape[:2], config.data.max_segments),
    )  # fmt: skip
    text = step.trace(state, batch).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in text  # layers are scanned
    tables = named_leaves((state.params, state.frozen))
    rows = next(leaf.shape[0] for path, leaf in tables if path.endswith("embed.embedding"))
    full = rf"tensor<{micro // machine.devices}x{config.data.max_length}x{rows}x"
    assert not re.search(full, text), "logits of all positions are formed"
