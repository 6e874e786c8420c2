"""Plans the recipes of the project on the machines that they are for, and checks that each fits; writes the README's table.

    python scripts/plan_recipes.py                      # all that scripts/plans.jsonl does not have yet
    python scripts/plan_recipes.py --only llama3_1_8b_full:v5p-16 --again
    python scripts/plan_recipes.py --estimate           # seconds each: those that are missing, until they are compiled
    python scripts/plan_recipes.py --table              # only the table, from scripts/plans.jsonl

Needs libtpu (pip install 'sft_jax[tpu]') and no TPU. A large model takes minutes on two cores. Models are their config.json
(scripts/recipe_models.json), so no network is needed either. Each plan is a line of scripts/plans.jsonl; those of machines for
which there is no compiler are estimates, and say so. Exit code 3 where a plan does not fit, or a program holds whole what it
should not (`whole_arrays`), and where what was promised of a TPU is an estimate.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from sft_jax.config import MeshConfig
from sft_jax.planning.machines import machine

ROOT = Path(__file__).resolve().parents[1]
MODELS, PLANS, README = ROOT / "scripts/recipe_models.json", ROOT / "scripts/plans.jsonl", ROOT / "README.md"
BEGIN, END = "<!-- plans: written by scripts/plan_recipes.py -->", "<!-- end of plans -->"
TOKENS = 100_000_000  # real tokens of an epoch, for hours


class Planned(NamedTuple):
    """A recipe on a machine."""

    recipe: str  # file and what stands behind the colon
    topology: str
    model: str  # hub id
    overrides: tuple[str, ...] = ()
    gate: str = ""  # what must hold, where it was promised

    @property
    def name(self) -> str:
        return " ".join((f"{self.recipe} on {self.topology}", *self.overrides))


_LLAMA = "meta-llama/Llama-3.1-8B"
PLANNED = (
    Planned("llama3_1_8b_full:v5p-16", "v5p-16", _LLAMA, gate="full fine-tuning of Llama 3.1 8B at 4096 tokens fits v5p-16"),
    Planned("llama3_1_8b_full:v5e-64", "v5e-64", _LLAMA, gate="full fine-tuning of Llama 3.1 8B at 4096 tokens fits v5e-64"),
    Planned("llama3_3_70b_lora:v5p-32", "v5p-32", "meta-llama/Llama-3.3-70B-Instruct", gate="LoRA of Llama 3.3 70B on a bfloat16 base fits v5p-32"),
    Planned("qwen3_8b_qlora", "v5e-8", "Qwen/Qwen3-8B", ("train.micro_batch_size=8",), "LoRA on an 8B base in NF4 fits one v5e-8"),
    Planned("qwen3_30b_a3b_full", "v5p-64", "Qwen/Qwen3-30B-A3B", gate="full fine-tuning of Qwen3 30B-A3B fits v5p-64"),
    Planned(
        "llama3_1_8b_full:v5p-16", "v5p-64", _LLAMA,
        ("data.max_length=131072", "mesh.context=8", "mesh.fsdp=4", "train.batch_size=4", "train.micro_batch_size=4"),
        "Llama 3.1 8B at 128k tokens with context parallelism fits v5p-64",
    ),
    Planned("llama3_1_8b_full:v5e-64", "2xv5e-64", _LLAMA, ("mesh.data=2", "train.batch_size=128", "train.micro_batch_size=128")),
    Planned("gemma3_4b_lora", "v5e-8", "google/gemma-3-4b-it"),
    Planned("llama3_3_70b_lora:h200x8", "h200x8", "meta-llama/Llama-3.3-70B-Instruct"),
    Planned("llama3_1_8b_lora", "h100x1", "meta-llama/Llama-3.1-8B-Instruct"),
    Planned("llama3_2_1b_full", "a100x1", "meta-llama/Llama-3.2-1B"),
    Planned("qwen3_0_6b_full", "a100x1", "Qwen/Qwen3-0.6B"),
    # The smallest cards that the README's table of recipes names.
    Planned("llama3_2_1b_full", "l40s", "meta-llama/Llama-3.2-1B"),
    Planned("llama3_2_1b_full", "a100-40", "meta-llama/Llama-3.2-1B", ("train.micro_batch_size=1",)),
    Planned("qwen3_0_6b_full", "rtx4090", "Qwen/Qwen3-0.6B"),
    Planned("qwen3_8b_qlora", "rtx4080", "Qwen/Qwen3-8B"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="plans whose name holds this")
    parser.add_argument("--again", action="store_true", help="also those that are there already")
    parser.add_argument("--estimate", action="store_true", help="do not compile")
    parser.add_argument("--table", action="store_true", help="plan nothing, write the table")
    arguments = parser.parse_args()
    done = read_plans()
    axes = {field.name for field in fields(MeshConfig)}
    for planned in () if arguments.table else PLANNED:
        if arguments.only and arguments.only not in planned.name:
            continue
        if planned.name in done and not arguments.again and (arguments.estimate or not to_compile(planned, done[planned.name])):
            continue
        missing = [key for key in planned.overrides if key.startswith("mesh.") and key[5:].partition("=")[0] not in axes]
        if missing:
            print(f"{planned.name}: left out, since there is no {', '.join(missing)} yet", file=sys.stderr)
            continue
        done[planned.name] = run(planned, arguments.estimate)
        PLANS.write_text("".join(json.dumps(done[other.name]) + "\n" for other in PLANNED if other.name in done))
    write_table(done)
    bad = {planned.name: wrong for planned in PLANNED if planned.name in done and (wrong := fault(planned, done[planned.name]))}
    for name, wrong in bad.items():
        print(f"{name}: {wrong}", file=sys.stderr)
    sys.exit(3 if bad else 0)


def fault(planned: Planned, plan: dict) -> str:
    """Returns what is wrong with a plan, or ""; what was promised of a machine for which there is a compiler is no matter of estimates."""
    if not plan["fits"]:
        return "does not fit"
    if plan["whole_arrays"]:
        return "; ".join(plan["whole_arrays"])
    if planned.gate and to_compile(planned, plan):
        return f"{planned.gate}: by estimate only; plan it again without --estimate"
    if not plan["estimated"] and plan["whole_arrays"] is None:
        return "was compiled before its arrays were looked at; plan it again with --again"
    return ""


def read_plans() -> dict[str, dict]:
    """Returns the plans of scripts/plans.jsonl by name."""
    lines = PLANS.read_text().splitlines() if PLANS.is_file() else []
    return {plan["name"]: plan for plan in map(json.loads, lines)}


def to_compile(planned: Planned, plan: dict) -> bool:
    """Returns whether a plan is an estimate although there is a compiler for its machine."""
    return plan["estimated"] and machine(planned.topology).chip.platform == "tpu"


def run(planned: Planned, estimate: bool) -> dict:
    """Returns the plan as the command gives it."""
    print(planned.name, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(json.loads(MODELS.read_text())[planned.model]))
        held_out = Path(folder, "held_out.jsonl")  # as in the recipes' docstrings, so that the eval step is planned as well
        held_out.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        file, _, argument = planned.recipe.partition(":")
        recipe = f"configs/{file}.py{':' + argument if argument else ''}"
        command = [
            sys.executable, "-m", "sft_jax.plan", "--config", recipe, f"--config.model.path={folder}", f"--config.data.eval={held_out}",
            "--topology", planned.topology, f"--tokens={TOKENS}", "--json", f"--estimate={estimate}", *(f"--config.{key}" for key in planned.overrides),
        ]  # fmt: skip
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode not in (0, 3):
        sys.exit(f"{planned.name}: exit code {result.returncode}")
    return {"name": planned.name, "gate": planned.gate, **json.loads(result.stdout)}


def write_table(plans: dict[str, dict]) -> None:
    """Writes the table between its marks in README.md."""
    rows = ["| recipe on machine | devices | memory of each, used of usable | room | roofline of a step |", "|---|---|---|---|---|"]
    for planned in PLANNED:
        if planned.name in plans:
            plan = plans[planned.name]
            used, usable, room = (plan[key] / 2**30 for key in ("needed_bytes", "usable_bytes", "room_bytes"))
            how = "~" if plan["estimated"] else ""
            rows.append(
                f"| `{planned.recipe}` on {planned.topology}{''.join(f', `{key}`' for key in planned.overrides)} | {plan['devices']} | "
                f"{how}{used:.1f} of {usable:.1f} GiB | {how}{room:.1f} GiB | {plan['roofline_seconds']:.2f} s |"
            )
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + "\n\n" + "\n".join(rows) + "\n\n" + END + after)


if __name__ == "__main__":
    main()
