"""The variables of each launcher, as they are set there, and the place in the run that follows."""

import doctest
import os
from pathlib import Path

import commands
import pytest

from sft_jax.errors import UserError
from sft_jax.training import clusters
from sft_jax.training.clusters import Place, as_variables, find_place, unused_tasks

ROOT = Path(__file__).parents[2]
FLAGS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
# As Slurm 22.05 to 24.11 set them in a step of `srun --ntasks=8`, in its second task on the second node.
SLURM = {
    "SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "gpu[007-010]", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "gpu[008-009]",
    "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
OPEN_MPI_4 = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    "environment, count, index, host",
    [
        (FLAGS, 4, 3, "10.0.0.1"),
        (FLAGS | {"JAX_COORDINATOR_ADDRESS": "[fe80::1]:1234"}, 4, 3, "[fe80::1]"),
        (SLURM, 8, 5, "gpu008"),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NUM_TASKS"}, 8, 5, "gpu008"),
        (SLURM | FLAGS, 4, 3, "10.0.0.1"),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:1234"}, 8, 5, "10.0.0.9"),
        (OPEN_MPI_4, 4, 2, "10.96.0.1"),
        (OPEN_MPI_4 | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370"}, 4, 2, "[fe80::b9b]"),
        (OPEN_MPI_4 | SLURM, 4, 2, "10.96.0.1"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-77@1"}, 4, 2, "127.0.0.1"),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:1234"}, 4, 2, "10.0.0.9"),
        (KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:8476", "JAX_NUM_PROCESSES": "2"}, 2, 1, "run-workers-0-0.run"),
    ],
    ids=["flags", "flags, IPv6", "Slurm", "older Slurm", "flags win", "Slurm, address", "Open MPI 4", "Open MPI 4, IPv6",
         "mpirun in a Slurm job", "Open MPI 5, one host", "Open MPI 5, hosts", "JobSet"],
)  # fmt: skip
def test_places(environment, count, index, host):
    place = find_place(environment)
    assert (place.count, place.index) == (count, index)
    assert place.address.rpartition(":")[0] == host
    assert 1024 < int(place.address.rpartition(":")[2]) < 65536


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        KUBERNETES,
    ],
    ids=["nothing", "a Slurm task", "sbatch without srun", "an MPI task", "an indexed job of single runs"],
)
def test_processes_that_are_alone(environment):
    assert find_place(environment) is None


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"JAX_NUM_PROCESSES": "2"}, r"JAX_NUM_PROCESSES \(--num_processes\): is set but JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": "0"}, r"JAX_PROCESS_ID \(--process_id\): is set but JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, r"JAX_NUM_PROCESSES \(--num_processes\): must be a number"),
        (FLAGS | {"JAX_PROCESS_ID": ""}, r"JAX_PROCESS_ID \(--process_id\): must be a number"),
        (FLAGS | {"JAX_PROCESS_ID": "4"}, r"JAX_PROCESS_ID \(--process_id\): must be below the number of processes, 4"),
        (FLAGS | {"JAX_COORDINATOR_ADDRESS": "somewhere"}, "must be host:port"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK: must be a number where Open MPI"),
        (OPEN_MPI, "JAX_COORDINATOR_ADDRESS: is missing; Open MPI 5"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID: must be a number where Slurm"),
        (KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "h:1"}, r"JAX_NUM_PROCESSES \(--num_processes\): must be a number"),
    ],
)
def test_a_part_of_the_variables_is_one_message(environment, words):
    with pytest.raises(UserError, match=words):
        find_place(environment)


def test_steps_of_a_job_have_ports_of_their_own():
    ports = {find_place(SLURM | {"SLURM_STEP_ID": str(step)}).address for step in range(4)}
    assert len(ports) == 4
    assert find_place(SLURM | {"JAX_COORDINATOR_PORT": "5555"}).address == "gpu008:5555"


def test_cloud_tpus_are_left_to_jax(monkeypatch):
    monkeypatch.setattr(clusters.glob, "glob", lambda pattern: ["/dev/accel0"] * pattern.startswith("/dev/accel"))
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: object())
    assert find_place({}) == Place("the TPU slice")
    assert find_place({"JAX_PLATFORMS": "cpu"}) is None
    gke = {"TPU_WORKER_HOSTNAMES": "a,b"}
    assert find_place(gke | {"TPU_WORKER_ID": "1"}) == Place("the TPU slice")
    with pytest.raises(UserError, match="TPU_WORKER_ID: must be a number"):
        find_place(gke)


def test_a_process_that_was_not_started_with_srun_is_told_so():
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert unused_tasks(batch) == 8
    assert unused_tasks(SLURM) == unused_tasks({}) == unused_tasks(batch | FLAGS) == unused_tasks(batch | {"SLURM_NTASKS": "1"}) == 0


def test_first_hosts():
    assert doctest.testmod(clusters).failed == 0 and doctest.testmod(clusters).attempted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "JAX_NUM_PROCESSES (--num_processes): is set but JAX_COORDINATOR_ADDRESS (--coordinator_address)"),
        (["--coordinator_address=host:1", "--num_processes=2", "--process_id=2"], "JAX_PROCESS_ID (--process_id): must be below"),
        (["--coordinator_address=host", "--num_processes=2", "--process_id=1"], "JAX_COORDINATOR_ADDRESS (--coordinator_address): must be host:port"),
        (["--process_id=one"], "flag --process_id=one"),
    ],
)
def test_flags_are_the_variables(tmp_path, flags, message):
    """Told by flags a place is refused as by variables, in one message, before anything is made."""
    given = ["--config=configs/sft.py", "--config.model.path=model", "--config.data.train=rows.jsonl", f"--workdir={tmp_path / 'run'}", *flags]
    done = commands.run("train", *given, env=os.environ, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_flags_win_over_the_environment():
    environment = SLURM | FLAGS | as_variables("10.0.0.2:99", None, 0)
    assert (find_place(environment).address, find_place(environment).count, find_place(environment).index) == ("10.0.0.2:99", 4, 0)
    assert as_variables(None, None, None) == {}
