"""How the processes of a run find each other."""

import socket
import types

import jax
import pytest

from sft_jax.errors import UserError
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
    assert (call["num_processes"], call["process_id"], call["heartbeat_timeout_seconds"]) == (2, 0, 230)
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
        monkeypatch.setattr(platform, "_START_SECONDS", 0.1)
        for name, value in {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"JAX_COORDINATOR_ADDRESS={address}: .*cannot be reached.*Start process 0"):
            platform.join_processes(100)


def test_processes_that_do_not_find_each_other_are_one_message(joined, monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier\ntimed out")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"the Slurm step 7\.: .*DEADLINE_EXCEEDED: barrier timed out"):
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
