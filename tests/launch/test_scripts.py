"""The shell scripts of scripts/launch: what shellcheck says, when run.sh starts again, and what flags.sh sets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_tools import libtpu, tool
from tiny_run import ROOT

LAUNCH = ROOT / "scripts/launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def test_shellcheck_has_nothing_to_say():
    result = subprocess.run([tool("shellcheck"), "--external-sources", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert len(SCRIPTS) >= 4 and result.returncode == 0, result.stdout


def run_script(tmp_path, code: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs run.sh with a command that appends a line to tmp_path/starts and then does `code`."""
    command = ["bash", str(LAUNCH / "run.sh"), "bash", "-c", f"echo start >> {tmp_path}/starts; {code}"]
    own = {**os.environ, "SFT_JAX_BACKOFF": "0", "SFT_JAX_DEVICE": "cpu"} | variables
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=60)


def starts(tmp_path) -> int:
    return (tmp_path / "starts").read_text().count("start")


@pytest.mark.parametrize("code", [0, 2, 3, 130])
def test_what_cannot_be_helped_is_not_started_again(tmp_path, code):
    assert run_script(tmp_path, f"exit {code}").returncode == code
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("code", [75, 1, 137])
def test_a_stopped_or_lost_process_is_started_again_until_the_cap(tmp_path, code):
    result = run_script(tmp_path, f"exit {code}", SFT_JAX_RESTARTS="2")
    assert result.returncode == code and starts(tmp_path) == 3
    assert "restart 2 of 2" in result.stderr and "not started again after 2 restarts" in result.stderr


def test_it_ends_when_the_command_succeeds(tmp_path):
    result = run_script(tmp_path, f"(( $(wc -l < {tmp_path}/starts) == 3 )) || exit 75")
    assert result.returncode == 0 and starts(tmp_path) == 3


@pytest.mark.slow
def test_waits_double_up_to_the_most(tmp_path):
    result = run_script(tmp_path, "exit 75", SFT_JAX_RESTARTS="4", SFT_JAX_BACKOFF="1", SFT_JAX_BACKOFF_MOST="2")
    assert [line.split(" in ")[1].split(" s")[0] for line in result.stderr.splitlines() if "starting again" in line] == ["1", "2", "2", "2"]


def test_output_goes_to_the_log_too(tmp_path):
    result = run_script(tmp_path, "echo said; echo cried >&2", SFT_JAX_LOG=str(tmp_path / "logs/run.log"))
    assert "said" in result.stdout and "cried" in result.stdout
    deadline = time.monotonic() + 10  # tee may end a moment later
    while time.monotonic() < deadline and "cried" not in (tmp_path / "logs/run.log").read_text():
        time.sleep(0.1)
    assert {"said", "cried"} <= set((tmp_path / "logs/run.log").read_text().split())


def test_a_signal_reaches_the_command_which_may_save_and_is_not_started_again(tmp_path):
    program = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print('saved', flush=True), sys.exit(75)))\nprint('up', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "run.sh"), sys.executable, "-c", program], env={**os.environ, "SFT_JAX_BACKOFF": "0"}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and output == "saved\n"


def start_run(tmp_path, trainer: str) -> subprocess.Popen:
    """Starts run.sh as tpu_vm.sh does on a host; it has begun the trainer once tmp_path/up exists."""
    command = ["setsid", "--wait", "bash", str(LAUNCH / "run.sh"), "bash", "-c", f"{trainer}; touch {tmp_path}/up; while :; do sleep 0.1; done", "sft_jax.train"]
    process = subprocess.Popen(command, env={**os.environ, "SFT_JAX_DEVICE": "cpu", "SFT_JAX_PID_FILE": str(tmp_path / "pid")})
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (tmp_path / "up").exists():
        time.sleep(0.05)
    return process


def end_run(tmp_path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(LAUNCH / "end_run.sh"), str(tmp_path / "pid")], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)


def test_an_earlier_run_is_ended_and_may_save(tmp_path):
    run = start_run(tmp_path, f"trap 'echo saved >> {tmp_path}/saved; exit 75' TERM")
    result = end_run(tmp_path)
    assert result.returncode == 0 and "an earlier run is still there" in result.stderr
    assert run.wait(10) == 75 and (tmp_path / "saved").read_text() == "saved\n" and not (tmp_path / "pid").exists()
    assert end_run(tmp_path).stderr == ""


@pytest.mark.parametrize("orphan", [False, True])
def test_an_earlier_run_that_does_not_end_is_killed(tmp_path, orphan):
    """Also where run.sh itself has gone, upon a broken pipe, and left the trainer behind."""
    run = start_run(tmp_path, f"trap '' TERM; echo $$ > {tmp_path}/trainer")
    if orphan:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert end_run(tmp_path, SFT_JAX_END_WAIT="1").returncode == 0
    run.wait(10)
    state = Path(f"/proc/{(tmp_path / 'trainer').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split(") ")[1].startswith("Z")


def test_a_number_that_another_program_has_now_is_left_alone(tmp_path):
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (tmp_path / "pid").write_text(str(other.pid))
    result = end_run(tmp_path)
    assert result.returncode == 0 and result.stderr == "" and other.poll() is None
    other.kill()
    other.wait()


@pytest.mark.parametrize(
    "variables, cpus",
    [
        ({"SLURM_CPUS_ON_NODE": "192", "SLURM_TASKS_PER_NODE": "1(x4)"}, 192),
        ({"SLURM_CPUS_ON_NODE": "192", "SLURM_TASKS_PER_NODE": "8(x4)"}, 24),
        ({"SLURM_CPUS_ON_NODE": "192", "SLURM_TASKS_PER_NODE": "8(x4)", "SLURM_CPUS_PER_TASK": "16"}, 16),
        ({"SLURM_CPUS_ON_NODE": "1", "SLURM_TASKS_PER_NODE": "2"}, 1),
    ],
    ids=["a process a node", "a process a GPU", "as the user says", "fewer cores than processes"],
)
def test_slurm_gives_each_process_its_share_of_the_cores(tmp_path, variables, cpus):
    srun = tmp_path / "srun"
    srun.write_text(f'#!/usr/bin/env bash\necho "$*" > {tmp_path}/asked\n')
    srun.chmod(0o755)
    of_slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_SUBMIT_DIR": str(ROOT)}
    own = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SFT_JAX_DEVICE": "cpu"} | of_slurm | variables
    subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), "--config=c"], env=own, capture_output=True, check=True)
    assert f"--cpus-per-task={cpus}" in (tmp_path / "asked").read_text().split()


def test_slurm_is_asked_for_whole_nodes():
    """Else a task gets one core of each, and a share of the memory by the core."""
    assert {"#SBATCH --exclusive", "#SBATCH --mem=0"} <= set((LAUNCH / "slurm.sbatch").read_text().splitlines())


def flags(variable: str, **variables: str) -> list[str]:
    script = f'source "{LAUNCH}/flags.sh"; printf %s "${{{variable}:-}}"'
    own = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")} | variables
    return subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=own, capture_output=True, text=True, check=True).stdout.split()


def test_flags_by_device():
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags("XLA_FLAGS", SFT_JAX_DEVICE="gpu")
    assert flags("LIBTPU_INIT_ARGS", SFT_JAX_DEVICE="gpu") == flags("XLA_FLAGS", SFT_JAX_DEVICE="tpu") == flags("XLA_FLAGS", SFT_JAX_DEVICE="cpu") == []
    assert "--xla_tpu_decompose_all_gather_einsum=true" in flags("LIBTPU_INIT_ARGS", SFT_JAX_DEVICE="tpu")


def test_what_the_user_has_set_wins():
    found = flags("XLA_FLAGS", SFT_JAX_DEVICE="gpu", XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x")
    assert found[:2] == ["--xla_gpu_enable_latency_hiding_scheduler=false", "--xla_dump_to=/x"]
    assert sum("latency_hiding" in flag for flag in found) == 1 and len(found) == 2 + len(flags("XLA_FLAGS", SFT_JAX_DEVICE="gpu")) - 1
    assert flags("LIBTPU_INIT_ARGS", SFT_JAX_DEVICE="tpu", SFT_JAX_OVERLAP="0") == []


def test_jaxlib_knows_the_flags():
    """One that it does not know ends the process; the build for CPUs reads those for GPUs too."""
    program = "import jax; jax.numpy.zeros(1).block_until_ready()"
    for xla_flags, knows in ((" ".join(flags("XLA_FLAGS", SFT_JAX_DEVICE="gpu")), True), ("--xla_gpu_no_such_flag=true", False)):
        result = subprocess.run([sys.executable, "-c", program], env={**os.environ, "XLA_FLAGS": xla_flags}, capture_output=True, text=True)
        assert (result.returncode == 0) == knows, result.stderr


@pytest.mark.slow
def test_libtpu_knows_the_flags():
    """libtpu needs no TPU to describe a topology, and reads its flags for that."""
    program = "from jax.experimental import topologies; topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1')"
    own = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LIBRARY_PATH": libtpu()}
    for args, knows in ((" ".join(flags("LIBTPU_INIT_ARGS", SFT_JAX_DEVICE="tpu")), True), ("--xla_tpu_no_such_flag=true", False)):
        result = subprocess.run([sys.executable, "-c", program], env=own | {"LIBTPU_INIT_ARGS": args}, capture_output=True, text=True)
        assert (result.returncode == 0) == knows, result.stderr
