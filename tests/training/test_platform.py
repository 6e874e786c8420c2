"""How the processes of a run find each other, and what is set before JAX looks for devices."""

import socket
import types
from pathlib import Path

import commands
import jax
import pytest
from jaxlib import xla_client
from tiny_run import ROOT, environment

import sft_jax
from sft_jax.errors import Unreachable, UserError
from sft_jax.planning.machines import CHIPS
from sft_jax.training import platform

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture
def joined(monkeypatch):
    """What `jax.distributed.initialize` was called with; nothing is joined."""
    calls = []
    update = jax.config.update
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None if "collectives" in name or "preemption" in name else update(name, value))
    for name in ("JAX_COORDINATOR_ADDRESS", *SLURM):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_single_process_joins_nothing(joined):
    platform.join_processes(100)
    assert joined == []


def test_tasks_of_a_slurm_step_find_each_other(joined, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    platform.join_processes(100)
    (call,) = joined
    assert (call["num_processes"], call["process_id"], call["heartbeat_timeout_seconds"], call["initialization_timeout"]) == (2, 0, 230, 300)
    assert call["coordinator_address"].startswith("n1:") and "local_device_ids" not in call
    assert call["cluster_detection_method"] == "deactivate"  # it would take all GPUs but one away from a task that has a node


def test_a_process_beside_srun_is_told_that_it_is_alone(joined, monkeypatch, capsys):
    for name, value in SLURM.items():
        if name != "SLURM_STEP_NODELIST":
            monkeypatch.setenv(name, value)
    platform.join_processes(100)
    assert joined == [] and "is alone in a Slurm allocation of 2 tasks; start it with srun" in capsys.readouterr().err


def test_a_first_process_that_cannot_be_reached_is_one_message(joined, monkeypatch):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"  # bound, but nobody listens
        monkeypatch.setenv("SFT_JAX_START_SECONDS", "0.1")
        for name, value in {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Unreachable, match=rf"JAX_COORDINATOR_ADDRESS={address}: .*cannot be reached at .* within 0.1 s.*Start process 0"):
            platform.join_processes(100)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_wait_that_is_no_time(joined, monkeypatch, text):
    for name, value in {**SLURM, "SFT_JAX_START_SECONDS": text}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"SFT_JAX_START_SECONDS: must be a number of seconds above 0, not '{text}'"):
        platform.join_processes(100)


def test_launchers_start_again_where_the_first_process_is_late(tmp_path):
    """Exit code 2 would end a job for good of which one machine is still being replaced."""
    place = ("--coordinator_address=127.0.0.1:9", "--num_processes=2", "--process_id=1")
    env = environment(1, tmp_path) | {"SFT_JAX_START_SECONDS": "0.2"}
    result = commands.run("train", "--config", ROOT / "configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *place, env=env, cwd=ROOT)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cannot be reached" in result.stderr and "SFT_JAX_START_SECONDS" in result.stderr


def test_processes_that_do_not_find_each_other_are_one_message(joined, monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier\ntimed out")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unreachable, match=r"the Slurm step 7\.: .*DEADLINE_EXCEEDED: barrier timed out"):
        platform.join_processes(100)


@pytest.mark.parametrize(
    ("platforms", "flags", "number", "several"),
    [
        ("cpu", "", -1, False),
        ("cpu", "--xla_force_host_platform_device_count=8", -1, True),
        ("cpu", "--xla_force_host_platform_device_count=8 --xla_force_host_platform_device_count=1", -1, False),
        ("cpu", "", 4, True),
        ("cpu", "--xla_force_host_platform_device_count=8", 1, False),
        (None, "--xla_force_host_platform_device_count=2", -1, True),
        ("tpu,cpu", "--xla_force_host_platform_device_count=8", -1, False),
    ],
)
def test_programs_are_kept_but_for_several_devices_on_the_cpu(monkeypatch, tmp_path, platforms, flags, number, several):
    """XLA for CPUs can wait for ever in the collectives of a program that it has read from the cache."""
    options = {
        "jax_platforms": platforms, "jax_num_cpu_devices": number, "jax_compilation_cache_dir": None, "jax_enable_compilation_cache": True,
    }  # fmt: skip
    config = types.SimpleNamespace(**options, update=lambda name, value: setattr(config, name, value))
    monkeypatch.setattr(platform, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    platform.set_up_platform(deterministic=False)
    assert config.jax_enable_compilation_cache is not several
    assert config.jax_compilation_cache_dir == (None if several else str(tmp_path / "sft_jax/compiled"))


@pytest.fixture
def started(monkeypatch):
    """Sets up a platform with these environment variables; returns the share of a GPU's memory that JAX is asked for."""

    def start(environment: dict[str, str]) -> str | None:
        config = types.SimpleNamespace(jax_platforms=None, jax_num_cpu_devices=-1, jax_compilation_cache_dir="chosen")
        monkeypatch.setattr(platform, "jax", types.SimpleNamespace(config=config))
        for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_PLATFORMS", "XLA_FLAGS"):
            monkeypatch.setenv(name, "")  # restored at the end, whatever is set meanwhile
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        platform.set_up_platform(deterministic=False)
        return xla_client.generate_pjrt_gpu_plugin_options().get("memory_fraction")

    return start


@pytest.mark.parametrize(
    ("environment", "fraction"),
    [
        ({}, 0.92),
        ({"JAX_PLATFORMS": ""}, 0.92),
        ({"JAX_PLATFORMS": "cuda,cpu"}, 0.92),
        ({"JAX_PLATFORMS": "cpu"}, None),
        ({"JAX_PLATFORMS": "tpu"}, None),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}, 0.6),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, None),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, 0.92),
        ({"XLA_FLAGS": "--xla_gpu_memory_fraction_policy=0.75+"}, None),
    ],
)
def test_gpus_give_the_memory_that_plans_count_with(started, environment, fraction):
    """As jaxlib reads it; what the user has chosen stays. JAX refuses its two names for the share together."""
    assert started(environment) == fraction


def test_plans_count_with_the_memory_that_a_run_takes(started):
    share = started({})
    for kind, gigabytes in {"a100": 80, "h100": 80, "h200": 141, "b200": 180}.items():
        assert CHIPS[kind].memory == pytest.approx(share * gigabytes * 1e9)


@pytest.mark.parametrize("command", ["chat", "compare", "evaluate", "export", "ledger", "report", "selfcheck"])
def test_every_command_that_runs_a_model_sets_up_its_platform(command):
    """`train`, `sweep` and `learning_curve` do so in what they call."""
    assert "set_up_platform(" in (Path(sft_jax.__file__).parent / f"{command}.py").read_text()
