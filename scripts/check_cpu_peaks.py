"""Compares what the planner estimates for --topology cpu with the peak memory of the real command, run as a process of its own.

    python scripts/check_cpu_peaks.py                   # the table; a minute a case on two cores that do nothing else
    python scripts/check_cpu_peaks.py --only LoRA --json

Each case is trained for three steps with empty caches, since compiling takes memory beside the arrays. Exit code 3 where an
estimate is further off than --within.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
WIDTHS = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
}  # fmt: skip
USUAL: dict[str, Any] = {
    "model.init": "random", "model.compute_dtype": "float32", "model.remat": "none", "data.chat_template": "chatml",
    "data.add_tokens": "<|im_start|>,<|im_end|>", "data.max_length": 512, "train.batch_size": 8, "train.steps": 3, "train.export": False,
    "checkpoint.every": 0, "checkpoint.save_last": False, "log.tensorboard": False,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "remat": {"model.remat": "full"},
    "accumulation": {"train.micro_batch_size": 2},
    "adafactor": {"optim.name": "adafactor"},
    "LoRA": {"adapter.name": "lora", "model.dtype": "bfloat16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--within", type=float, default=0.15)
    arguments = parser.parse_args()
    worst = 0.0
    for name in arguments.only or CASES:
        found = compare(name)
        worst = max(worst, abs(found["error"]))
        line = f"{name:16}{found['measured'] / GIB:8.2f} GiB measured{found['estimated'] / GIB:8.2f} estimated{found['error']:>+8.1%}"
        print(json.dumps(found) if arguments.json else line, flush=True)
    sys.exit(3 if worst > arguments.within else 0)


def compare(name: str) -> dict[str, Any]:
    """Returns the bytes at the peak of a run and those that are estimated."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"))
        settings = {"model.path": model, **USUAL, **CASES[name]}
        workdir = Path(folder, "run")
        run(folder, "sft_jax.train", {**settings, "data.train": ROOT / "data/quickstart/train.jsonl"}, f"--workdir={workdir}")
        measured = json.loads((workdir / "summary.json").read_text())["peak_memory_bytes"]["host"]
        plan = json.loads(run(folder, "sft_jax.plan", settings, "--topology=cpu", "--memory-gib=1024", "--tokens=1e5", "--json"))
    return {"case": name, "measured": measured, "estimated": plan["needed_bytes"], "error": plan["needed_bytes"] / measured - 1}


def write_model(folder: Path) -> Path:
    """Writes a directory with config.json and the quickstart's tokenizer; parameters are drawn."""
    folder.mkdir()
    nano = ROOT / "models/nano"
    for file in nano.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({**json.loads((nano / "config.json").read_text()), **WIDTHS}))
    return folder


def run(folder: str, module: str, settings: dict[str, Any], *flags: str) -> str:
    """Runs a command with caches of its own and returns its standard output."""
    command = [sys.executable, "-m", module, f"--config={ROOT / 'configs/sft.py'}", *flags]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(Path(folder, "cache"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
