"""The flags of the launchers let a TPU gather the kernels of a layer while it computes the one before, read from the schedule."""

import re
import subprocess
from pathlib import Path

import pytest
from tiny_plans import tiny_config, write_model

from sft_jax.model.platform import tracing_for
from sft_jax.planning import planner
from sft_jax.planning.hlo import Instruction, Program
from sft_jax.planning.launcher import flags_beside, tpu_flags
from sft_jax.planning.machines import machine
from sft_jax.planning.program import has_tpu_compiler, make_programs, mesh_of

LAUNCHER = Path(__file__).parents[2] / "scripts/launch/flags.sh"
MACHINE = "v5e-4"
MOVES = ("get-tuple-element", "bitcast", "copy")  # what an array may pass on its way without being computed with


@pytest.mark.parametrize(
    ("given", "overlap"), [("", "1"), ("--xla_tpu_enable_ici_ag_pipelining=false --xla_other=1", "1"), ("", "0")], ids=["none", "own", "off"]
)
def test_plans_and_launchers_set_the_same_flags(given, overlap):
    """What is set already wins in both, and both can be told to set none."""
    script = f'SFT_JAX_DEVICE=tpu; SFT_JAX_OVERLAP={overlap}; LIBTPU_INIT_ARGS="{given}"; source "{LAUNCHER}"; printf %s "$LIBTPU_INIT_ARGS"'
    printed = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=True).stdout
    set_there = dict(flag.removeprefix("--").split("=") for flag in printed.split())
    own = dict(flag.removeprefix("--").split("=") for flag in given.split())
    assert set_there == {**flags_beside({"LIBTPU_INIT_ARGS": given, "SFT_JAX_OVERLAP": overlap}), **own}
    assert len(set_there) >= (10 if overlap == "1" else 0)


def operands(line: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", line.text.partition(f"{line.opcode}(")[2].partition(")")[0])


def handed_on(program: Program, body: str) -> int:
    """How many arrays a pass through a loop gathers and gives to the next one, which computes with them."""
    lines = {line.name: line for line in program.computations[body]}

    def is_gathered(name: str) -> bool:
        line = lines.get(name)
        if line is None:
            return False
        if line.opcode == "fusion":
            return any("AsyncCollectiveDone" in inner.text for inner in program.computations[line.attribute("calls")])
        if line.opcode in MOVES:
            return is_gathered(operands(line)[0])
        return line.opcode == "all-gather"

    root = next(line for line in lines.values() if line.is_root)
    return sum(map(is_gathered, operands(root))) if root.opcode == "tuple" else 0


@pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed (pip install 'sft_jax[tpu]')")
@pytest.mark.slow
@pytest.mark.parametrize("set_by_launcher", [True, False])
def test_kernels_are_gathered_a_layer_ahead(tmp_path, set_by_launcher):
    model = write_model(tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    config = tiny_config(model, train__batch_size=16, train__micro_batch_size=8)
    with tracing_for("tpu"):
        programs = make_programs(config, planner.base_of(config), mesh_of(config, machine(MACHINE), compiled=True), lambda text: None)
        lowered = programs.train_step.lower(programs.state, programs.batch)
        program = Program(lowered.compile(compiler_options=tpu_flags() if set_by_launcher else None).as_text())
    loops = [line.attribute("body") for line in program.instructions() if line.opcode == "while"]
    counts = sorted(handed_on(program, body) for body in loops)
    # Seven kernels of a layer, in the forward pass and again in the backward pass; without the flags none.
    assert (min(counts[-2:]) >= 7) if set_by_launcher else not any(counts), counts
    # One micro-batch after the other: nothing of the next one is begun, which would be held in memory beside this one.
    losses = [line.op_name for line in program.instructions() if line.opcode == "while" and line.op_name.endswith("cross_entropy/while")]
    assert len(losses) == 1, losses
