"""Commands in several processes on this machine, which find each other on the loopback."""

import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tiny_run import environment, train_command


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_processes(config, workdir, cache, count: int, own=lambda index: {}) -> list[subprocess.Popen]:
    """Starts the training command in `count` processes; see `start_commands`.

    `config` is that of all, or a list of one for each.
    """
    configs = config if isinstance(config, list) else [config] * count
    return start_commands([train_command(each, workdir) for each in configs], cache, own)


def start_commands(commands: Sequence[list[str]], cache, own=lambda index: {}) -> list[subprocess.Popen]:
    """Starts a process with each command, which share eight devices; `own` gives the environment of one alone."""
    count, address = len(commands), f"127.0.0.1:{free_port()}"
    started = []
    for index, command in enumerate(commands):
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        started.append(
            subprocess.Popen(
                command, env=environment(8 // count, cache) | variables | own(index), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        )
    return started


def finish(processes: list[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    """Waits for all; one that waits for another for ever is killed, and has a negative return code."""

    def wait(process):
        try:
            output, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(wait, processes))


def run_processes(config, workdir, cache, count: int, own=lambda index: {}) -> list[subprocess.CompletedProcess]:
    return finish(start_processes(config, workdir, cache, count, own))
