"""Which run a process belongs to, read from the variables that its launcher sets. No device and no network is touched.

JAX has detectors of its own. They are used on Cloud TPUs alone, where the answer is in a metadata server; elsewhere they ask
for a package and for rights in the cluster (Kubernetes), know Open MPI before 5 only, and give every Slurm task one GPU, also
one that has a node for itself.
"""

import glob
import importlib.util
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sft_jax.errors import UserError

Environment = Mapping[str, str]
_FIRST_PORT, _PORTS = 61440, 4096  # ports of coordinators, as JAX chooses them
_COUNT, _INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"  # what `sft_jax.train` sets of its flags
_FLAGS = {"JAX_COORDINATOR_ADDRESS": "--coordinator_address", _COUNT: "--num_processes", _INDEX: "--process_id"}


@dataclass(frozen=True)
class Place:
    """The place of this process among the processes of its run.

    None is what the launcher does not say: the address of the first process, or (Kubernetes) the number of processes.
    On Cloud TPUs all is None, and JAX asks the metadata server.
    """

    launcher: str
    address: str | None = None  # host:port at which the first process listens
    count: int | None = None
    index: int | None = None


def find_place(environment: Environment) -> Place | None:
    """Returns the place of this process, complete but on Cloud TPUs, or None for a run of one process.

    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID win over what a launcher says;
    the flags of `sft_jax.train` are these.

    Raises UserError, naming the variable, where only a part is set.
    """
    told = next((place for detect in LAUNCHERS.values() if (place := detect(environment)) is not None), None)
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        for name in (_COUNT, _INDEX):
            if environment.get(name):
                raise UserError(
                    f"{name} ({_FLAGS[name]}): is set but JAX_COORDINATOR_ADDRESS (--coordinator_address), host:port of the first process, "
                    "is not; set both or neither."
                )
        if told and told.launcher == "Kubernetes":
            return None  # an indexed job may as well be many runs
        if told and told.launcher == "Open MPI" and told.address is None:
            raise UserError(
                "JAX_COORDINATOR_ADDRESS: is missing; Open MPI 5 does not tell the host of the first process. Start with "
                "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT, where HOST is the first host of the run and PORT is free there."
            )
        return told
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS (--coordinator_address): must be host:port of the first process, not '{address}'.")
    count = _number(environment, _COUNT, told.count if told else None)
    index = _number(environment, _INDEX, told.index if told else None)
    if not index < count:
        raise UserError(f"JAX_PROCESS_ID (--process_id): must be below the number of processes, {count}, not {index}.")
    return Place(f"JAX_COORDINATOR_ADDRESS={address}", address, count, index)


def as_variables(address: str | None, count: int | None, index: int | None) -> dict[str, str]:
    """Returns the variables that say what flags have said; None is a flag that was not given."""
    return {name: str(value) for name, value in zip(_FLAGS, (address, count, index), strict=True) if value is not None}


def check_alone(what: str, environment: Environment) -> None:
    """Raises UserError in a job of several processes; `what` is what needs one alone."""
    if find_place(environment) is not None:
        raise UserError(f"Several processes were started; {what} is one process, which uses all devices of its host. Start one, on one host.")


def unused_tasks(environment: Environment) -> int:
    """Returns the tasks of a Slurm allocation in which this process was started without srun, and so alone; else 0."""
    tasks = environment.get("SLURM_NTASKS", "")
    alone = "SLURM_JOB_ID" in environment and _slurm(environment) is None and not environment.get("JAX_COORDINATOR_ADDRESS")
    started = "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment
    return int(tasks) if alone and not started and tasks.isdigit() and int(tasks) > 1 else 0


def _number(environment: Environment, name: str, told: int | None) -> int:
    value = environment.get(name, "")
    if not value and told is not None:
        return told
    if not value.isdigit():
        where = "where JAX_COORDINATOR_ADDRESS is set and no launcher says it"
        raise UserError(f"{name} ({_FLAGS[name]}): must be a number {where}, not '{value}'.")
    return int(value)


def _all_of(environment: Environment, names: tuple[str, ...], launcher: str) -> list[int]:
    """Returns the numbers that a launcher sets together."""
    for name in names:
        if not environment.get(name, "").isdigit():
            raise UserError(
                f"{name}: must be a number where {launcher} starts the processes, not '{environment.get(name, '')}'. Hand the "
                f"variables of the launcher on to the process, or remove those that begin like {names[0]}."
            )
    return [int(environment[name]) for name in names]


def _open_mpi(environment: Environment) -> Place | None:
    """mpirun of Open MPI: version 4 says where it runs itself, which is taken for the first host, version 5 does not."""
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    if not any(name in environment for name in names[:2]):
        return None
    count, index, here = _all_of(environment, names, "Open MPI")
    if count == 1:
        return None
    address = None
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or 1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    port = _port(environment, uri or environment.get("PMIX_NAMESPACE", ""))
    if host:
        address = f"{host[1]}:{port}" if host[1] else f"[{host[2]}]:{port}"
    elif here == count:
        address = f"127.0.0.1:{port}"
    return Place("Open MPI", address, count, index)


def _slurm(environment: Environment) -> Place | None:
    """srun with several tasks; inside an allocation without srun there is only one process."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    if not all(name in environment for name in names):
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if tasks not in environment:
        return None
    count, index = _all_of(environment, (tasks, "SLURM_PROCID"), "Slurm")
    if count == 1:
        return None
    step = f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_STEP_ID', '')}"
    host = _first_host(environment["SLURM_STEP_NODELIST"])
    return Place(f"the Slurm step {step}", f"{host}:{_port(environment, step)}", count, index)


def _first_host(hosts: str) -> str:
    """Returns the first host of a list as Slurm writes it.

    >>> [_first_host(hosts) for hosts in ("n1", "n1,m2", "n[01-15],m2", "n[007,9-15]-ib,m2", "r[1-2]n[3-4]")]
    ['n1', 'n1', 'n01', 'n007-ib', 'r1n3']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _port(environment: Environment, run: str) -> str:
    """Returns a port that the processes of a run agree on without a message, and those of another run hardly choose."""
    return environment.get("JAX_COORDINATOR_PORT") or str(_FIRST_PORT + zlib.crc32(run.encode()) % _PORTS)


def _cloud_tpu(environment: Environment) -> Place | None:
    """A TPU machine that JAX will use: it has the library and the devices, and no other platform is asked for."""
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if "tpu" not in platforms or importlib.util.find_spec("libtpu") is None or not devices:
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")  # set by GKE
    if hosts and not environment.get("TPU_WORKER_ID", "").isdigit():
        raise UserError(
            f"TPU_WORKER_ID: must be a number where TPU_WORKER_HOSTNAMES is set, not '{environment.get('TPU_WORKER_ID', '')}'. "
            "GKE sets both in every container that requests google.com/tpu; do not overwrite either."
        )
    return Place("the TPU slice")


def _kubernetes(environment: Environment) -> Place | None:
    """A pod of an indexed job: its index is the process; the manifest says JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    return Place("Kubernetes", index=_all_of(environment, ("JOB_COMPLETION_INDEX",), "Kubernetes")[0])


# The first that recognises the environment wins. mpirun may itself use srun for its daemons, and so goes before Slurm.
LAUNCHERS: dict[str, Callable[[Environment], Place | None]] = {
    "open_mpi": _open_mpi, "slurm": _slurm, "cloud_tpu": _cloud_tpu, "kubernetes": _kubernetes,
}  # fmt: skip
