"""tpu_vm.sh against a gcloud that only says what it was asked for: requests, preemption, what is deleted at the end."""

import os
import subprocess
import tarfile

import pytest
from tiny_run import ROOT

SCRIPT = ROOT / "scripts/launch/tpu_vm.sh"
# A request is ACTIVE once it was created. The first `trainings` trainings are cut by a preemption; later ones end with `code`.
GCLOUD = """#!/usr/bin/env bash
shift 2
echo "$*" >> {folder}/calls
case "$1 $2" in
  "queued-resources create") echo ACTIVE > {folder}/state ;;
  "queued-resources delete") rm -f {folder}/state ;;
  "queued-resources describe") cat {folder}/state 2>/dev/null || exit 1 ;;
  "tpu-vm scp") cp "$3" {folder}/sent.tar.gz ;;
  "tpu-vm ssh")
    [[ "$*" == *run.sh* ]] || exit 0
    echo training >> {folder}/trainings
    if (( $(wc -l < {folder}/trainings) <= {trainings} )); then echo SUSPENDED > {folder}/state; exit 255; fi
    exit {code} ;;
esac
"""
OPTIONS = ["--name", "mine", "--zone", "z", "--type", "v5litepod-16", "--workdir", "gs://b/run", "--wait", "0"]


def run_tpu_vm(folder, *arguments: str, trainings: int = 0, code: int = 0) -> tuple[subprocess.CompletedProcess, list[str]]:
    gcloud = folder / "bin/gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(GCLOUD.format(folder=folder, trainings=trainings, code=code))
    gcloud.chmod(0o755)
    own = {**os.environ, "PATH": f"{gcloud.parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", str(SCRIPT), *arguments], env=own, capture_output=True, text=True, timeout=120)
    calls = folder / "calls"
    return result, calls.read_text().splitlines() if calls.exists() else []


def test_a_preempted_slice_is_requested_again_until_the_run_is_done(tmp_path):
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, "--spot", "--", "--config", "configs/sft.py", "--config.model.path=a b", trainings=2)
    assert result.returncode == 0, result.stderr
    created = [call for call in calls if "resources create" in call]
    assert len(created) == 3 and all("--spot" in call and "--runtime-version=v2-alpha-tpuv5-lite" in call and "--node-id=mine" in call for call in created)
    assert sum("resources delete" in call for call in calls) == 3  # two that were preempted, and the last one, for nothing is left running
    assert (tmp_path / "trainings").read_text().count("training") == 3
    (command, *_) = [call for call in calls if "run.sh" in call]
    assert "--config.model.path=a\\ b" in command and "--workdir gs://b/run" in command and "SFT_JAX_DEVICE=tpu" in command
    assert "request mine: SUSPENDED" not in result.stderr and "restart 2 of 20" in result.stderr


@pytest.mark.parametrize("repository", [True, False])
def test_what_is_sent_is_the_source_alone(tmp_path, repository):
    """Neither environments nor runs nor what git ignores: they may be gigabytes. A file that is not committed yet is part of it."""
    source = tmp_path / "source"
    kept = {"pyproject.toml", "sft_jax/train.py", "configs/new one.py"}
    for name in kept | {".venv-launch/lib/torch.so", ".venv/bin/python", "runs/a/metrics.jsonl", "gone.py"}:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    if repository:
        (source / ".gitignore").write_text(".venv*\nruns/\n")
        for command in (["init", "--quiet"], ["add", "pyproject.toml", "sft_jax", "gone.py"]):
            subprocess.run(["git", "-C", source, *command], check=True)
        kept = kept | {".gitignore"}
    (source / "gone.py").unlink()
    result, _ = run_tpu_vm(tmp_path, *OPTIONS, "--source", str(source), "--", "--config", "c")
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / "sent.tar.gz") as archive:
        assert {name.removeprefix("./") for name in archive.getnames()} == kept


def test_slices_train_at_the_same_time(tmp_path):
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, "--slices", "2", "--", "--config", "c")
    assert result.returncode == 0, result.stderr
    assert any("--node-prefix=mine --node-count=2" in call for call in calls)
    assert [sum(f"tpu-vm ssh mine-{node}" in call and "run.sh" in call for call in calls) for node in range(2)] == [1, 1]


@pytest.mark.parametrize("keep", [False, True])
def test_wrong_input_is_not_tried_again(tmp_path, keep):
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, *["--keep"] * keep, "--", "--config", "c", code=2)
    assert result.returncode == 2 and sum("resources create" in call for call in calls) == 1
    assert any("resources delete" in call for call in calls) != keep


def test_the_number_of_restarts_is_bounded(tmp_path):
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, "--restarts", "1", "--", "--config", "c", code=1)
    assert result.returncode == 1 and "not requested again after 1 restarts" in result.stderr
    assert (tmp_path / "trainings").read_text().count("training") == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--zone", "z"], "--name: is missing"),
        ([*OPTIONS, "--config", "c"], "'--config' is not an option; arguments of the trainer go behind --"),
        (OPTIONS, "arguments of sft_jax.train are missing"),
        ([*OPTIONS, "--workdir", "/tmp/x", "--", "a"], "must be gs://BUCKET/RUN"),
        ([*OPTIONS, "--type", "v99-1", "--", "a"], "has no known runtime"),
        ([*OPTIONS, "--spot", "--reserved", "--", "a"], "name one of them"),
    ],
)
def test_wrong_options_are_one_message(tmp_path, arguments, words):
    result, calls = run_tpu_vm(tmp_path, *arguments)
    assert result.returncode == 2 and not calls
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in error
