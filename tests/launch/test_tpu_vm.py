"""tpu_vm.sh against a gcloud that only says what it was asked for: requests, preemption, what is deleted at the end."""

import os
import subprocess
import tarfile

import pytest
from tiny_run import ROOT

SCRIPT = ROOT / "scripts/launch/tpu_vm.sh"
# A request is ACTIVE once it was created. The first `trainings` trainings are cut by a preemption; later ones end with `code`.
# A line of faults, such as `create 2 503: unavailable`, is what gcloud says where it is asked for that the second time.
GCLOUD = """#!/usr/bin/env bash
shift 2
echo "$*" >> {folder}/calls
if fault="$(grep "^$2 $(grep -c "^$1 $2 " {folder}/calls) " {folder}/faults)"; then
  echo "ERROR: (gcloud.compute.tpus.$1.$2) ${{fault#* * }}" >&2
  exit 1
fi
case "$1 $2" in
  "queued-resources create") echo ACTIVE > {folder}/state ;;
  "queued-resources delete") rm -f {folder}/state ;;
  "queued-resources describe") cat {folder}/state 2>/dev/null || {{ echo "ERROR: NOT_FOUND: Resource mine was not found" >&2; exit 1; }} ;;
  "tpu-vm scp") cp "$3" {folder}/sent.tar.gz ;;
  "tpu-vm ssh")
    cat > /dev/null # as ssh does
    [[ ! -d {folder}/host ]] || {{ {folder}/on_host "$@"; exit; }}
    [[ "$*" == *launch/run.sh* ]] || exit 0
    echo training >> {folder}/trainings
    if (( $(wc -l < {folder}/trainings) <= {trainings} )); then echo SUSPENDED > {folder}/state; exit 255; fi
    exit {code} ;;
esac
"""
OPTIONS = ["--name", "mine", "--zone", "z", "--type", "v5litepod-16", "--workdir", "gs://b/run", "--wait", "0"]


def write_program(path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def run_tpu_vm(folder, *arguments: str, trainings: int = 0, code: int = 0, faults: tuple[str, ...] = ()) -> tuple[subprocess.CompletedProcess, list[str]]:
    write_program(folder / "bin/gcloud", GCLOUD.format(folder=folder, trainings=trainings, code=code))
    (folder / "faults").write_text("".join(f"{fault}\n" for fault in faults))
    own = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", str(SCRIPT), *arguments], env=own, capture_output=True, text=True, timeout=120)
    calls = folder / "calls"
    return result, calls.read_text().splitlines() if calls.exists() else []


def make_host(folder, trainer: str, install: str = "exit 0") -> None:
    """Makes a VM, whose commands are run: its Python cannot be used, and the installer of uv brings one whose Python is `trainer`.

    The connection to the first training is lost where folder/lost exists, and the training goes on.
    """
    (folder / "host").mkdir()
    write_program(folder / "trainer", trainer)
    for name in ("python", "python3", "pip"):
        write_program(folder / f"host_bin/{name}", f"echo {name} >> {folder}/old_python; exit 1")
    write_program(folder / "uv", f'echo "$*" >> {folder}/uv_calls\ncase "$*" in venv*) mkdir -p .venv/bin && cp {folder}/trainer .venv/bin/python ;; pip*) {install} ;; esac')
    write_program(folder / "host_bin/curl", f'echo "mkdir -p \\$HOME/.local/bin; cp {folder}/uv \\$HOME/.local/bin/uv"')
    write_program(
        folder / "on_host",
        f"""export HOME={folder}/host PATH={folder}/host_bin:/usr/bin:/bin SFT_JAX_BACKOFF=0
cd && cp {folder}/sent.tar.gz sft_jax.tar.gz
for argument; do [[ "$argument" != --command=* ]] || command="${{argument#--command=}}"; done
[[ "$command" == *launch/run.sh* && -f {folder}/lost ]] || exec bash -c "$command"
rm {folder}/lost
bash -c "$command" > /dev/null 2>&1 &
until [[ -s {folder}/pids ]]; do sleep 0.1; done
exit 255""",
    )


def test_a_preempted_slice_is_requested_again_until_the_run_is_done(tmp_path):
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, "--spot", "--", "--config", "configs/sft.py", "--config.model.path=a b", trainings=2)
    assert result.returncode == 0, result.stderr
    created = [call for call in calls if "resources create" in call]
    assert len(created) == 3 and all("--spot" in call and "--runtime-version=v2-alpha-tpuv5-lite" in call and "--node-id=mine" in call for call in created)
    assert sum("resources delete" in call for call in calls) == 3  # two that were preempted, and the last one, for nothing is left running
    assert (tmp_path / "trainings").read_text().count("training") == 3
    (command, *_) = [call for call in calls if "launch/run.sh" in call]
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
    assert [sum(f"tpu-vm ssh mine-{node}" in call and "launch/run.sh" in call for call in calls) for node in range(2)] == [1, 1]


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
    "faults, words",
    [
        (("create 2 503: The service is currently unavailable.",), "503"),
        (("delete 1 409: unable to queue the operation",), "cannot be deleted (ERROR: (gcloud.compute.tpus.queued-resources.delete) 409"),
        (("describe 3 Connection reset by peer", "describe 4 Connection reset by peer"), "cannot be looked at"),
        (("scp 1 ssh: connect to host 10.0.0.2 port 22: Connection refused",), "installing failed"),
        (tuple(f"describe {count} Reauthentication failed" for count in range(1, 11)), "try 10 of 10"),
    ],
    ids=["create", "delete", "a blip of describe", "scp", "describe for long"],
)
def test_an_error_of_gcloud_is_a_try_like_any_other(tmp_path, faults, words):
    """The run goes on, and what was requested is neither requested twice nor left behind."""
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, "--restarts", "4", "--", "--config", "c", trainings=1, faults=faults)
    assert result.returncode == 0 and words in result.stderr, result.stderr
    assert (tmp_path / "trainings").read_text().count("training") == 2 and not (tmp_path / "state").exists()
    assert sum("resources create" in call for call in calls) == 2 + any(fault.startswith("create") for fault in faults)


def test_errors_of_gcloud_count_as_restarts(tmp_path):
    faults = tuple(f"create {count} RESOURCE_EXHAUSTED: no capacity" for count in range(1, 9))
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, "--restarts", "2", "--", "--config", "c", faults=faults)
    assert result.returncode == 1 and "not requested again after 2 restarts" in result.stderr
    assert sum("resources create" in call for call in calls) == 3


def test_a_request_that_cannot_be_right_is_not_tried_again(tmp_path):
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, "--", "--config", "c", faults=("create 1 INVALID_ARGUMENT: zone",))
    assert result.returncode == 2 and sum("resources create" in call for call in calls) == 1
    assert "error: the slice cannot be requested: ERROR: (gcloud.compute.tpus.queued-resources.create) INVALID_ARGUMENT: zone" in result.stderr


def test_a_slice_that_cannot_be_deleted_at_the_end_is_named(tmp_path):
    faults = tuple(f"delete {count} 409: busy" for count in range(1, 9))
    result, calls = run_tpu_vm(tmp_path, *OPTIONS, "--", "--config", "c", faults=faults)
    assert result.returncode == 0 and sum("resources delete" in call for call in calls) == 5
    assert "still there and costs money; delete it with: gcloud compute tpus queued-resources delete mine --zone=z --force" in result.stderr


def test_a_host_needs_no_python_of_its_own(tmp_path):
    make_host(tmp_path, trainer=f'echo "$*" > {tmp_path}/arguments')
    result, _ = run_tpu_vm(tmp_path, *OPTIONS, "--", "--config", "c")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "arguments").read_text().split() == ["-m", "sft_jax.train", "--config", "c", "--workdir", "gs://b/run"]
    made, installed = (tmp_path / "uv_calls").read_text().splitlines()
    assert made.startswith("venv ") and "--python 3.12" in made and installed.endswith("--editable .[tpu,remote]")
    assert not (tmp_path / "old_python").exists()


def test_nothing_is_trained_where_a_step_of_the_installation_fails(tmp_path):
    make_host(tmp_path, trainer=f"echo >> {tmp_path}/trainings", install=f"(( $(wc -l < {tmp_path}/uv_calls) > 2 ))")
    result, _ = run_tpu_vm(tmp_path, *OPTIONS, "--restarts", "0", "--", "--config", "c")
    assert result.returncode == 1 and "installing failed" in result.stderr and not (tmp_path / "trainings").exists()


def test_installing_is_tried_again(tmp_path):
    make_host(tmp_path, trainer=f"echo >> {tmp_path}/trainings", install=f"(( $(wc -l < {tmp_path}/uv_calls) > 2 ))")
    result, _ = run_tpu_vm(tmp_path, *OPTIONS, "--", "--config", "c")
    assert result.returncode == 0 and "restart 1 of 20" in result.stderr and (tmp_path / "trainings").read_text().count("\n") == 1


def test_a_trainer_that_lost_its_connection_is_ended_before_the_next_begins(tmp_path):
    """It saves upon the signal, once; the next one finds the TPU free."""
    trainer = f"""echo $$ >> {tmp_path}/pids
if (( $(wc -l < {tmp_path}/pids) > 1 )); then ! kill -0 $(head -n 1 {tmp_path}/pids) 2>/dev/null; exit; fi
trap 'echo saved >> {tmp_path}/saved; sleep 0.5; exit 75' TERM
while :; do sleep 0.1; done"""
    make_host(tmp_path, trainer)
    (tmp_path / "lost").touch()
    result, _ = run_tpu_vm(tmp_path, *OPTIONS, "--restarts", "1", "--", "--config", "c")
    assert result.returncode == 0, result.stderr
    assert "an earlier run is still there" in result.stderr and (tmp_path / "saved").read_text() == "saved\n"
    assert len((tmp_path / "pids").read_text().split()) == 2


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
