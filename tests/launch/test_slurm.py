"""The Slurm launcher on a real cluster of one node: two tasks, requeued in the middle, from sbatch to the export."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from one_node_slurm import missing_programs, one_node_slurm
from tiny_run import ROOT, environment, tiny_config, train_command

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing_programs()), reason=f"Slurm is not installed ({', '.join(missing_programs())}); apt-get install slurm-wlm munge"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


def submit(cluster, log: Path, arguments: list[str], **variables: str) -> int:
    command = ["sbatch", "--parsable", "--ntasks-per-node=2", f"--output={log}", str(ROOT / "scripts/launch/slurm.sbatch"), *arguments]
    # One compilation cache, and no more than one thread of XLA for each of the two tasks.
    own = environment(1, log.parent / "xdg") | {"SFT_JAX_DEVICE": "cpu", "SFT_JAX_PYTHON": sys.executable, "SFT_JAX_ROOT": str(ROOT)} | variables
    result = subprocess.run(command, env=own | {"SLURM_CONF": cluster["SLURM_CONF"], "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def wait_for(condition, log: Path, seconds: float = 900):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        text = log.read_text() if log.exists() else ""
        if found := condition(text):
            return found
        time.sleep(0.3)
    raise AssertionError(f"not seen within {seconds} s:\n{text}")


def job_value(cluster, job: int, name: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", str(job)], env=cluster, capture_output=True, text=True).stdout
    return re.search(rf"\b{name}=(\w+)", shown)[1]


def job_state(cluster, job: int) -> str:
    return job_value(cluster, job, "JobState")


def test_two_tasks_go_on_after_a_requeue_and_export(cluster, tmp_path):
    """The quickstart's model and data, fewer steps; `scontrol requeue` sends SIGTERM, upon which the trainer saves."""
    log, workdir = tmp_path / "job.log", tmp_path / "run"
    arguments = ["--config=configs/quickstart.py", f"--workdir={workdir}", "--config.train.steps=60", "--config.eval.generate=16",
                 "--config.log.every=5", f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.train.heartbeat_seconds=60"]  # fmt: skip
    job = submit(cluster, log, arguments)
    wait_for(lambda text: re.search(r"^step (1\d|2\d)/60", text, re.M), log)
    assert int(job_value(cluster, job, "NumCPUs")) == max(2, os.cpu_count()) and job_value(cluster, job, "OverSubscribe") == "NO"
    subprocess.run(["scontrol", "requeue", str(job)], env=cluster, check=True)
    wait_for(lambda text: "Done: 60 steps" in text and job_state(cluster, job) == "COMPLETED", log)
    text = log.read_text()
    print(text)
    saved = int(re.search(r"Stopped by \w+(?: to another process)? after step (\d+) of 60; the state is saved", text)[1])
    assert f"Continuing from checkpoint {saved}." in text and 10 <= saved < 60
    assert "start 1: 2 processes" in text and "start 2: 2 processes" in text
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["processes"] == 2
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"split": "train"' in line]
    assert steps == list(range(5, 61, 5))
    assert (workdir / "export/model.safetensors").is_file() and json.loads((workdir / "summary.json").read_text())["finished"]


def test_a_job_that_stops_itself_is_requeued_and_one_that_cannot_run_is_not(cluster, tmp_path):
    """Exit code 75 is started again, at most SFT_JAX_RESTARTS times; wrong input is not."""
    config = tiny_config(tmp_path, train__steps=4, train__stop_after_steps=2)
    log = tmp_path / "stopping.log"
    job = submit(cluster, log, train_command(config, tmp_path / "stopping")[3:], SFT_JAX_RESTARTS="1")
    wait_for(lambda text: job_state(cluster, job) in ("COMPLETED", "FAILED"), log)
    text = log.read_text()
    assert "requeued (restart 1 of 1)" in text and "Continuing from checkpoint 2." in text and "start 2: 2 processes" in text, text
    log = tmp_path / "wrong.log"
    job = submit(cluster, log, [f"--config={ROOT / 'configs/sft.py'}", f"--workdir={tmp_path / 'wrong'}"])
    wait_for(lambda text: job_state(cluster, job) == "FAILED", log)
    assert "model.path: is missing" in log.read_text() and "requeued" not in log.read_text(), shlex.join(log.read_text().splitlines())
