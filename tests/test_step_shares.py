"""What the time of a traced step goes to."""

import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import ROOT, environment, tiny_config, train_flags

sys.path.insert(0, str(ROOT / "scripts"))
import step_shares

from sft_jax.planning.hlo import Program


def traced(folder, **scopes):
    """Profiles a program whose matmuls in each scope are so many as `scopes` says; returns trace and program."""
    w = jnp.ones((256, 256)) / 256

    def train_step(x):
        for scope, count in scopes.items():
            with jax.named_scope(scope):
                for _ in range(count):
                    x = jnp.tanh(x @ w)
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x)

    step = jax.jit(train_step)
    compiled = step.lower(w).compile()
    compiled(w).block_until_ready()
    with jax.profiler.trace(str(folder / "trace")):
        for _ in range(3):
            compiled(w).block_until_ready()
    (folder / "program.txt").write_text(compiled.as_text())
    return folder / "trace", folder / "program.txt"


def test_time_goes_to_the_scopes_that_take_it(tmp_path):
    shares = step_shares.step_shares(*traced(tmp_path, attend=12, cross_entropy=1, layer=4))
    assert set(shares) == {*step_shares.KINDS, "idle"} and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert shares["attention"] > 2 * shares["loss"] > 0 and shares["matmul"] > 0
    assert shares["optimizer"] == shares["communication"] == 0


@pytest.mark.slow
def test_every_kind_is_found_in_a_run_over_devices(tmp_path):
    """As the head of the script says it is done."""
    config = tiny_config(tmp_path, train__steps=4, train__profile=2, checkpoint__every=0)
    env = environment(8, tmp_path / "xdg")
    env["XLA_FLAGS"] += f" --xla_dump_to={tmp_path / 'dump'} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=train_step"
    done = commands.run("train", *train_flags(config, tmp_path / "run"), env=env)
    assert done.returncode == 0, done.stderr
    shares = step_shares.step_shares(tmp_path / "run/profile", tmp_path / "dump")
    assert all(shares[kind] > 0 for kind in step_shares.KINDS), shares


def test_what_overlaps_counts_once_and_waiting_is_idle():
    kinds = {"dot": "matmul", "flash": "attention", "gather": "communication"}
    events = [("flash", 0, 10), ("dot", 5, 20), ("gather", 15, 30), ("gather", 50, 60), ("dot", 90, 100)]
    shares = step_shares.device_shares(events, kinds)
    assert shares == {"attention": 0.1, "matmul": 0.2, "loss": 0, "optimizer": 0, "other": 0, "communication": 0.2, "idle": 0.5}


@pytest.mark.parametrize("seed", range(5))
def test_unions_are_those_of_a_grid(seed):
    rng = np.random.default_rng(seed)
    begins = rng.integers(0, 200, 40)
    spans = [(int(begin), int(begin + size)) for begin, size in zip(begins, rng.integers(0, 9, 40), strict=True)]
    covered = np.zeros(300, bool)
    for begin, end in spans:
        covered[begin:end] = True
    assert step_shares.length(step_shares.union(spans)) == covered.sum()


PROGRAM = """
HloModule jit_train_step

%fused (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  ROOT %dot.1 = f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  %fusion.1 = f32[8,8] fusion(%x), kind=kOutput, calls=%fused, metadata={op_name="jit(train_step)/layers/mlp/dot_general"}
  %fusion.2 = f32[8,8] fusion(%fusion.1), kind=kOutput, calls=%fused, metadata={op_name="jit(train_step)/transpose(jvp(attend))/dot_general"}
  %gemm.3 = (f32[8,8], s8[64]) custom-call(%fusion.2), custom_call_target="__cublas$gemm", metadata={op_name="jit(train_step)/layers/dot_general"}
  %get = f32[8,8] get-tuple-element(%gemm.3), index=0
  %all-gather-start.1 = f32[8,8] all-gather-start(%get), dimensions={0}, metadata={op_name="jit(train_step)/attend/all_gather"}
  %add.1 = f32[8,8] add(%get, %x), metadata={op_name="jit(train_step)/optimizer/cond/add"}
  ROOT %tanh.9 = f32[8,8] tanh(%add.1), metadata={op_name="jit(train_step)/layers/norm/tanh"}
}
"""


def test_kinds_of_instructions():
    kinds = step_shares.kinds_of(Program(PROGRAM))
    named = {name: kinds[name] for name in ("fusion.1", "fusion.2", "gemm.3", "all-gather-start.1", "add.1", "tanh.9")}
    assert named == {
        "fusion.1": "matmul", "fusion.2": "attention", "gemm.3": "matmul", "all-gather-start.1": "communication", "add.1": "optimizer",
        "tanh.9": "other",
    }  # fmt: skip


def test_missing_files_are_named(tmp_path):
    with pytest.raises(SystemExit, match="holds no .*after_optimizations"):
        step_shares.step_shares(tmp_path, tmp_path)
    (tmp_path / "module_1.jit_train_step.cpu_after_optimizations.txt").write_text(PROGRAM)
    with pytest.raises(SystemExit, match="holds no trace"):
        step_shares.step_shares(tmp_path, tmp_path)
