"""Compares what the planner estimates of memory with what the TPU compiler says, over models, layouts and settings.

    python scripts/check_estimates.py                   # the table; minutes a case on two cores, seconds where it was compiled before
    python scripts/check_estimates.py --only tensor     # cases whose name holds this
    python scripts/check_estimates.py --json            # one line a case
    python scripts/check_estimates.py --flags           # as the launchers have it compiled: what is gathered ahead beside the rest

Needs libtpu (pip install 'sft_jax[tpu]') and no TPU. Models have the widths of those that are published and few layers, since
layers of one kind are one loop; scripts/plans.jsonl has the whole recipes, with the launchers' flags. Compared are all bytes of a
device while it runs the train step, and what of them is no state. Exit code 3 where an estimate is further off than --within.
scripts/estimates.jsonl is what --json printed; the tests hold the estimates against it.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from sft_jax.config import Config, default_config
from sft_jax.config_parsing import parse_config
from sft_jax.planning.machines import GIB, machine
from sft_jax.planning.planner import Plan, base_of, make_plan

MODELS = Path(__file__).with_name("recipe_models.json")
RECORDED = Path(__file__).with_name("estimates.jsonl")
WITHIN = 0.10


class Case(NamedTuple):
    """A run of one step: a published model of so many layers on a machine."""

    name: str
    model: str
    layers: int
    topology: str
    settings: dict[str, Any]


_1B, _8B, _QWEN, _EXPERTS = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B"
_GEMMA = "google/gemma-3-4b-it"
_ROWS = {"data.max_length": 4096, "train.batch_size": 16, "train.micro_batch_size": 4, "mesh.fsdp": -1}
_LORA = {"adapter.name": "lora", "adapter.rank": 16, "adapter.alpha": 32.0, "model.dtype": "bfloat16"}
_LONG = {"data.max_length": 32768, "train.batch_size": 4, "train.micro_batch_size": 2, "mesh.fsdp": 2, "mesh.context": 4}
CASES = tuple(
    Case(name, model, layers, topology, {**_ROWS, **settings})
    for name, model, layers, topology, settings in (
        ("fsdp", _1B, 4, "v5e-4", {}),
        ("remat none", _1B, 4, "v5e-4", {"model.remat": "none"}),
        ("remat dots", _1B, 4, "v5e-4", {"model.remat": "dots"}),
        ("no accumulation", _1B, 4, "v5e-4", {"train.batch_size": 4}),
        ("two rows a device", _1B, 4, "v5e-4", {"train.micro_batch_size": 8}),
        ("short rows", _1B, 4, "v5e-4", {"data.max_length": 512, "train.batch_size": 64, "train.micro_batch_size": 32}),
        ("twice the layers", _1B, 8, "v5e-4", {}),
        ("bfloat16", _1B, 4, "v5e-4", {"model.dtype": "bfloat16"}),
        ("adafactor", _1B, 4, "v5e-4", {"optim.name": "adafactor"}),
        ("one device", _1B, 4, "v5e-1", {"train.micro_batch_size": 1}),
        ("data", _1B, 4, "v5e-4", {"mesh.data": 4, "mesh.fsdp": 1, "train.max_replicated": 1.0}),
        ("data x fsdp", _1B, 4, "v5e-4", {"mesh.data": 2, "mesh.fsdp": 2}),
        ("tensor", _1B, 4, "v5e-4", {"mesh.tensor": 4, "mesh.fsdp": 1}),
        ("fsdp x tensor", _1B, 4, "v5e-4", {"mesh.tensor": 2, "mesh.fsdp": 2}),
        ("LoRA", _1B, 4, "v5e-4", _LORA),
        ("8B layers", _8B, 4, "v5e-16", {"train.batch_size": 32, "train.micro_batch_size": 16}),
        ("8B layers, LoRA", _8B, 4, "v5e-8", {**_LORA, "train.micro_batch_size": 8}),
        ("8B layers, NF4", _QWEN, 4, "v5e-8", {**_LORA, "adapter.base_dtype": "nf4", "train.micro_batch_size": 8}),
        ("8B layers, NF4, remat none", _QWEN, 2, "v5e-8",
         {**_LORA, "adapter.base_dtype": "nf4", "train.micro_batch_size": 8, "data.max_length": 1024, "model.remat": "none"}),
        ("context", _8B, 2, "v5p-16", _LONG),
        ("context, LoRA", _8B, 2, "v5p-16", {**_LONG, **_LORA, "mesh.fsdp": 1, "mesh.context": 8}),
        ("experts", _EXPERTS, 2, "v5p-8", {"model.dtype": "bfloat16"}),
        ("experts, expert", _EXPERTS, 2, "v5p-8", {"model.dtype": "bfloat16", "mesh.expert": 4, "mesh.fsdp": 1}),
        ("experts, LoRA, remat dots", _EXPERTS, 2, "v5p-8", {**_LORA, "model.remat": "dots"}),
        ("sliding windows", _GEMMA, 6, "v5e-8", {**_LORA, "train.micro_batch_size": 8}),
    )
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--json", action="store_true", help="one line a case")
    parser.add_argument("--flags", action="store_true", help="with the launchers' flags for TPUs")
    parser.add_argument("--within", type=float, default=WITHIN, help="how far an estimate may be off")
    arguments = parser.parse_args()
    worst = 0.0
    if not arguments.json:
        print(f"{'case':28}{'state':>9}{'compiled':>10}{'estimated':>10}{'off by':>8}{'beside the state':>18}")
    for case in CASES:
        if arguments.only and arguments.only not in case.name:
            continue
        found = compare(case, plain=not arguments.flags)
        worst = max(worst, abs(found["error"]))
        if arguments.json:
            print(json.dumps(found), flush=True)
            continue
        sizes = "".join(f"{found[key] / GIB:>{width}.2f}" for key, width in (("state", 9), ("compiled", 10), ("estimated", 10)))
        print(f"{case.name:28}{sizes}{found['error']:>+8.1%}{found['error_beside_state']:>+18.1%}", flush=True)
    sys.exit(3 if worst > arguments.within else 0)


def compare(case: Case, plain: bool) -> dict[str, Any]:
    """Returns the bytes of a device by the compiler's word and by estimate, and how far the estimate is off."""
    compiled, estimated = (plan(case, by_estimate, plain) for by_estimate in (False, True))
    state, needed = compiled.held.state, compiled.train.needed
    return {
        "case": case.name, "machine": case.topology, "state": state, "compiled": needed, "estimated": estimated.train.needed,
        "error": estimated.train.needed / needed - 1, "error_beside_state": (estimated.train.needed - state) / (needed - state) - 1,
        "fits": compiled.train.fits,
    }  # fmt: skip


def plan(case: Case, estimated: bool, plain: bool) -> Plan:
    """Returns the plan of a case; `plain` is without the launchers' flags."""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(case, Path(folder))
        return make_plan(config, machine(case.topology), base_of(config), estimated=estimated, log=lambda text: None, plain=plain)


def configured(case: Case, folder: Path) -> Config:
    """Returns the configuration of a case, with its model's config.json in `folder`."""
    model = json.loads(MODELS.read_text())[case.model]
    model.get("text_config", model)["num_hidden_layers"] = case.layers
    (folder / "config.json").write_text(json.dumps(model))
    raw = default_config()
    raw.model.path = str(folder)
    raw.train.steps = 1
    raw.update_from_flattened_dict(case.settings)
    return parse_config(raw, needs_data=False)


if __name__ == "__main__":
    main()
