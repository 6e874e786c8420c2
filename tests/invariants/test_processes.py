"""One process, two and four give the same run, and one continues what another number began."""

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_run import environment, final_checksums, metrics, run_command, tiny_config, train_command

LAYOUT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_processes(config, workdir, cache, count: int, own=lambda index: {}) -> list[subprocess.CompletedProcess]:
    """Runs the command in `count` processes that share eight devices; `own` gives the environment of one alone."""
    address = f"127.0.0.1:{free_port()}"

    def run(index: int):
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        return subprocess.run(
            train_command(config, workdir), env=environment(8 // count, cache) | variables | own(index), capture_output=True, text=True, timeout=300
        )

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.fixture(scope="module")
def single(folder):
    """The run of one process with eight devices."""
    config = tiny_config(folder, train__epochs=1.0, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, data__eval=str(folder / "held_out.jsonl"))
    result = run_command(config, folder / "single", folder / "xdg", devices=8)
    assert result.returncode == 0, result.stderr
    return config, folder / "single"


def assert_close(a, b):
    assert len(a) == len(b)
    for ours, theirs in zip(a, b, strict=True):
        assert (ours["step"], ours["split"]) == (theirs["step"], theirs["split"])
        for name in ("loss", "grad_norm", "learning_rate", "real_tokens", "supervised_tokens", "tokens"):
            assert (name in ours) == (name in theirs)
            if name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=LAYOUT_TOLERANCE * (10 if name == "grad_norm" else 1))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_equal_one(folder, single, count):
    config, workdir = single
    results = run_processes(config, folder / f"of{count}", folder / "xdg", count)
    assert [result.returncode for result in results] == [0] * count, results[0].stderr
    # The collectives library prints lines of its own, from several threads.
    told = [line for result in results[1:] for line in result.stdout.splitlines() if line.startswith(("step ", "Steps", "Training", "Model", "Done"))]
    assert not told, "only the first process prints"
    assert_close(metrics(folder / f"of{count}"), metrics(workdir))


def test_another_number_of_processes_continues(folder, single):
    """Two processes stop; one continues: the state is the one that was saved, bit for bit, and so are later rows."""
    config, workdir = single
    config = config.copy_and_resolve_references()
    config.train.stop_after_steps = 3
    results = run_processes(config, folder / "moved", folder / "xdg", 2)
    assert [result.returncode for result in results] == [75, 75], results[0].stderr
    saved = final_checksums(folder / "moved")
    assert saved["step"] == 3 and saved["position"] == 24
    config.train.stop_after_steps = 0
    result = run_command(config, folder / "moved", folder / "xdg", devices=8)  # restoring compares every checksum
    assert result.returncode == 0, result.stderr
    assert "Continuing from checkpoint 3." in result.stdout
    assert_close(metrics(folder / "moved"), metrics(workdir))


def test_data_that_one_process_refuses_end_all_of_them_with_one_message(folder):
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": 5}]}\n')
    config = tiny_config(folder, data__train=str(folder / "bad.jsonl"))
    first, second = run_processes(config, folder / "refused", folder / "xdg", 2)
    assert (first.returncode, second.returncode) == (2, 2), second.stderr
    assert "bad.jsonl:1: " in first.stderr and "Traceback" not in first.stderr
    assert "Process 0 failed" in second.stderr and "Traceback" not in second.stderr


def test_processes_that_have_other_rows_do_not_train(folder):
    """Files of the same name on two hosts, of which one is older."""
    tiny_config(folder)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for index in range(2):
        (folder / f"home{index}").mkdir()
        (folder / f"home{index}" / "rows.jsonl").write_text("".join(lines[index:]))
    config = tiny_config(folder, data__train="~/rows.jsonl")
    results = run_processes(config, folder / "differing", folder / "xdg", 2, lambda index: {"HOME": str(folder / f"home{index}")})
    assert [result.returncode for result in results] == [2, 2], results[0].stderr
    assert all("process 1 has other rows than process 0" in result.stderr for result in results)
