"""A tiny model as a directory that holds config.json alone, and configurations of runs that train it."""

import json
from pathlib import Path

from published_configs import published_config

from sft_jax.config import Config, default_config
from sft_jax.config_parsing import parse_config

LENGTH, ROWS, MICRO = 256, 8, 4
# No share of the vocabulary is the positions of a device, since plans tell tables from states by their shapes.
MODEL = {
    **published_config("LlamaForCausalLM"), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1280, "tie_word_embeddings": False,
}  # fmt: skip


def write_model(folder: Path, base: dict = MODEL, **changed) -> str:
    """Writes config.json, without weights, and returns the directory."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**base, **changed}))
    return str(folder)


def tiny_config(model: str, **settings) -> Config:
    """A run on the model; settings are keys with "__" in place of dots."""
    raw = default_config()
    raw.model.path = model
    raw.data.max_length = LENGTH
    raw.train.batch_size, raw.train.micro_batch_size = ROWS, MICRO
    raw.train.steps = 100
    raw.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
    return parse_config(raw, needs_data=False)
