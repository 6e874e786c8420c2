"""A run small enough for tests: a random model of two layers with the tokenizer of models/nano, and 96 chat rows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
from xla_flags import xla_flags

import sft_jax
from sft_jax.config import default_config
from sft_jax.hf.load import load_decoder, load_model_tokenizer
from sft_jax.model.options import Options

ROOT = Path(__file__).parents[1]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make_model(folder: Path) -> Path:
    """Writes config.json and tokenizer of a tiny Llama; its weights are drawn by `model.init` "random"."""
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "models/nano" / name, folder)
    config = json.loads((ROOT / "models/nano/config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_base(folder: Path) -> Path:
    """Writes folder / "base", the model of `tiny_config(folder)` with weights, and returns it."""
    drawn = load_decoder(tiny_config(folder).model.path, Options(), init="random", seed=3)
    sft_jax.save(drawn, load_model_tokenizer(folder / "model"), folder / "base")
    return folder / "base"


def make_rows(path: Path, count: int = 96, seed: int = 0) -> Path:
    """Writes chats of very different lengths."""
    rng = np.random.default_rng(seed)
    words = "lamp alarm Oslo train ticket noon rain seven kitchen music".split()
    with open(path, "w") as file:
        for _ in range(count):
            turns = []
            for _ in range(rng.integers(1, 4)):
                turns.append({"role": "user", "content": " ".join(rng.choice(words, rng.integers(1, 9)))})
                turns.append({"role": "assistant", "content": " ".join(rng.choice(words, rng.integers(1, 6)))})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def tiny_config(folder: Path, **changes):
    """Returns the configuration of a run on what `folder` holds, making it where it is missing."""
    if not (folder / "model").is_dir():
        make_model(folder / "model")
        make_rows(folder / "train.jsonl")
        make_rows(folder / "held_out.jsonl", 12, seed=1)
    config = default_config()
    config.model.path = str(folder / "model")
    config.model.init = "random"
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.data.train = str(folder / "train.jsonl")
    config.data.cache_dir = str(folder / "cache")
    config.data.max_length = 96
    config.data.workers = 1
    config.train.epochs = 2.0
    config.train.batch_size = 8
    config.train.export = False
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.optim.learning_rate = 1e-2
    config.log.every = 1
    config.log.tensorboard = False
    config.checkpoint.every = 2
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    return config


def as_flags(config) -> list[str]:
    """Returns the changes of a configuration against the defaults as command-line flags."""

    def changes(values: dict, defaults: dict, prefix: str):
        for key, value in values.items():
            if isinstance(defaults[key], dict):
                yield from changes(value, defaults[key], f"{prefix}{key}.")
            elif value != defaults[key]:
                yield f"--config.{prefix}{key}={value}"

    return list(changes(config.to_dict(), default_config().to_dict(), ""))


def train_flags(config, workdir: Path) -> list[str]:
    return [f"--config={ROOT / 'configs/sft.py'}", f"--workdir={workdir}", *as_flags(config)]


def train_command(config, workdir: Path) -> list[str]:
    return [sys.executable, "-m", "sft_jax.train", *train_flags(config, workdir)]


def environment(devices: int, cache: Path) -> dict[str, str]:
    """Returns the environment of a training process with so many CPU devices and a compilation cache of its own."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices),
            "XDG_CACHE_HOME": str(cache)}  # fmt: skip


def run_command(config, workdir: Path, cache: Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
    return commands.run("train", *train_flags(config, workdir), env=environment(devices, cache))


def metrics(workdir: Path) -> list[dict]:
    """Returns the records of metrics.jsonl without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "per_second")
    return [{k: v for k, v in json.loads(line).items() if not any(word in k for word in clock)} for line in lines]


def final_checksums(workdir: Path) -> dict:
    """Returns the newest checkpoint's step and the shape, dtype and checksum of every array."""
    from sft_jax.checkpoint.checkpoints import committed_steps, read_manifest

    step = committed_steps(workdir / "checkpoints")[-1]
    manifest = read_manifest(workdir / "checkpoints" / str(step))
    return {"step": step, "position": manifest["position"], "arrays": manifest["arrays"]}


def exposures(workdir: Path):
    """Returns the exposures of all parts of the ledger, which must follow one on the other without a gap."""
    from sft_jax.dynamics.parts import read_exposures

    found, parts = read_exposures(workdir / "ledger")
    assert [first for first, _ in parts] == [1, *(last + 1 for _, last in parts[:-1])]
    return found


def assert_same_exposures(ours: Path, theirs: Path, tolerance: float = 0.0) -> None:
    """Asserts that two runs have seen the same documents at the same steps, with the same sums: bitwise, or nearly."""
    ours, theirs = exposures(ours), exposures(theirs)
    for name, values in vars(theirs).items():
        np.testing.assert_allclose(getattr(ours, name), values, rtol=tolerance, atol=tolerance, err_msg=name)
