"""A Slurm cluster of one node, with a configuration, a state and ports of its own, for as long as a test runs."""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=60
MinJobAge=3600
SchedulerParameters=sched_interval=2,requeue_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def one_node_slurm(folder: Path):
    """Starts the cluster and yields the environment in which sbatch and the others find it."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    values = {"host": host, "folder": folder, "user": pwd.getpwuid(os.getuid()).pw_name,
              "cpus": max(2, os.cpu_count()), "controller": _free_port(), "node": _free_port()}  # fmt: skip
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(**values))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", f"--pid-file={folder}/munged.pid",
              f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munged.log"]  # fmt: skip
    commands = [munged, ["slurmctld", "-D", "-i", "-f", str(configuration)], ["slurmd", "-D", "-f", str(configuration), "-N", host]]
    started = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "w") as output:
                started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
            time.sleep(1)
        _wait_for_node(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", f"--user={values['user']}"], env=environment, capture_output=True)  # of a test that failed
        time.sleep(2)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for_node(environment: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True)
        if found.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted([*folder.glob("*.log"), *folder.glob("*.out")]))
    raise RuntimeError(f"the node did not become idle ({found.stdout.strip()} {found.stderr.strip()})\n{logs}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
