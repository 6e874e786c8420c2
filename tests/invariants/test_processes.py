"""One process, two and four give the same run, one continues what another number began, and none waits for one that is lost."""

import fcntl
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import safetensors.numpy
from several_processes import finish, run_processes, start_processes
from slow_values import slow
from tiny_run import ROOT, assert_same_exposures, final_checksums, make_base, metrics, run_command, tiny_config

LAYOUT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def end_with_one_message_each(results: list[subprocess.CompletedProcess]) -> None:
    for result in results:
        assert result.returncode == 2, result.stdout + result.stderr
        own = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(own) == 1 and "Traceback" not in result.stderr, result.stderr


@pytest.fixture(scope="module")
def single(folder):
    """The run of one process with eight devices."""
    config = tiny_config(folder, train__epochs=4.0, checkpoint__every=0, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, data__eval=str(folder / "held_out.jsonl"))
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


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.cluster)])
def test_processes_equal_one(folder, single, count):
    config, workdir = single
    results = run_processes(config, folder / f"of{count}", folder / "xdg", count)
    assert [result.returncode for result in results] == [0] * count, results[0].stderr
    # The collectives library prints lines of its own, from several threads.
    told = [line for result in results[1:] for line in result.stdout.splitlines() if line.startswith(("step ", "Steps", "Training", "Model", "Done"))]
    assert not told, "only the first process prints"
    assert_close(metrics(folder / f"of{count}"), metrics(workdir))
    assert_same_exposures(folder / f"of{count}", workdir, 1e-4)


@pytest.mark.cluster
def test_other_numbers_of_processes_continue(folder):
    """Four processes stop, two go on and stop, one ends the run: state as it was saved, bit for bit, and the same rows of a mixture."""
    tiny_config(folder)
    sets = {name: {"path": str(folder / f"{file}.jsonl"), "weight": weight} for name, file, weight in (("a", "train", 0.7), ("b", "held_out", 0.3))}
    config = tiny_config(folder, train__steps=9, checkpoint__every=0, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, data__train=sets)
    result = run_command(config, folder / "mixed", folder / "xdg", devices=8)
    assert result.returncode == 0, result.stderr
    config.train.stop_after_steps = 3
    for count, reached in ((4, 3), (2, 6)):
        results = run_processes(config, folder / "moved", folder / "xdg", count)
        assert [result.returncode for result in results] == [75] * count, results[0].stderr
        saved = final_checksums(folder / "moved")
        assert (saved["step"], saved["position"]) == (reached, reached * 8)
    config.train.stop_after_steps = 0
    result = run_command(config, folder / "moved", folder / "xdg", devices=8)  # restoring compares every checksum, and the plan of rows
    assert result.returncode == 0, result.stderr
    assert "Continuing from checkpoint 6." in result.stdout
    assert_close(metrics(folder / "moved"), metrics(folder / "mixed"))
    assert_same_exposures(folder / "moved", folder / "mixed", 1e-4)
    counts = [[{k: v for k, v in record.items() if k.startswith("data/")} for record in metrics(folder / name)] for name in ("moved", "mixed")]
    assert counts[0] == counts[1] and counts[0][-1]["data/b/documents"] > 0


@pytest.mark.slow
def test_adapters_of_two_processes_are_those_of_one(folder, single):
    """Drawn, trained, restored and written: two processes stop, go on, and leave the adapter that one process leaves."""
    changes = dict(adapter__name="dora", adapter__rank=4, adapter__init="pissa", adapter__train=["norm"], adapter__tokens=[5, 6])
    changes |= dict(model__path=str(make_base(folder)), model__init="checkpoint", train__export=True)
    config = tiny_config(folder, train__steps=4, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **changes)
    result = run_command(config, folder / "adapter_of1", folder / "xdg", devices=8)
    assert result.returncode == 0, result.stderr
    config.train.stop_after_steps = 2
    for code in (75, 0):
        results = run_processes(config, folder / "adapter_of2", folder / "xdg", 2)
        assert [result.returncode for result in results] == [code, code], results[0].stderr + results[1].stderr
    assert_close(metrics(folder / "adapter_of2"), metrics(folder / "adapter_of1"))
    one, two = (safetensors.numpy.load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("adapter_of1", "adapter_of2"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-3 * np.abs(one[name]).max(), err_msg=name)


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
    end_with_one_message_each(results)
    assert all("data (tokens): process 1 (on " in result.stderr and "Give every process the same data files" in result.stderr for result in results)


def test_processes_that_differ_do_not_start(folder):
    """In their configuration or their code, at once: the item is named with both values."""
    config, other = tiny_config(folder), tiny_config(folder, optim__learning_rate=5e-3)
    copy = shutil.copytree(ROOT / "sft_jax", folder / "changed/sft_jax").parent
    with open(copy / "sft_jax/batch.py", "a") as file:
        file.write("# edited on one host only\n")
    cases = {
        "optim.learning_rate": ([config, other], lambda index: {}, "has 0.005, and process 0 (on "),
        "the source of sft_jax": ([config, config], lambda index: {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"} if index else {}, ", and process 0 (on "),
    }
    for item, (configs, own, values) in cases.items():
        results = run_processes(configs, folder / "differing_start", folder / "xdg", 2, own)
        end_with_one_message_each(results)
        for result in results:
            assert f"error: {item}: process 1 (on " in result.stderr and values in result.stderr, result.stderr
        assert not (folder / "differing_start").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.cluster)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(folder, count):
    """Only the second process is signalled; all save, end with 75, and go on bit for bit as if nothing had been."""
    config = tiny_config(folder, train__steps=16, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, checkpoint__every=0)
    whole, workdir = folder / f"not_signalled_{count}", folder / f"signalled_{count}"
    results = run_processes(config, whole, folder / "xdg", count)
    assert [result.returncode for result in results] == [0] * count, results[0].stderr
    processes = start_processes(config, workdir, folder / "xdg", count)
    for line in processes[0].stdout:
        if line.startswith("step 2/"):
            processes[1].send_signal(signal.SIGTERM)
            break
    results = finish(processes)
    assert [result.returncode for result in results] == [75] * count, results[0].stderr + results[1].stderr
    assert "Stopped by a signal to another process after step" in results[0].stderr
    assert "Stopped by SIGTERM after step" in results[1].stderr
    stopped = final_checksums(workdir)["step"]
    assert 2 < stopped < final_checksums(whole)["step"]
    results = run_processes(config, workdir, folder / "xdg", count)
    assert [result.returncode for result in results] == [0] * count, results[0].stderr
    assert final_checksums(workdir) == final_checksums(whole) and metrics(workdir) == metrics(whole)


@pytest.mark.parametrize("lost, count", [*slow((1, 2), (0, 2)), pytest.param(2, 4, marks=pytest.mark.cluster)])
def test_a_killed_process_ends_the_others_and_a_restart_continues(folder, lost, count):
    """In bounded time, with one message and exit code 1; the first process is also what all of them meet through."""
    config = tiny_config(folder, train__heartbeat_seconds=6.0, checkpoint__every=2, train__epochs=4.0)
    workdir = folder / f"killed_{lost}_of_{count}"
    processes = start_processes(config, workdir, folder / "xdg", count)
    for line in processes[0].stdout:
        if line.startswith("step 5/"):
            processes[lost].kill()
            break
    killed = time.monotonic()
    results = finish(processes)
    assert time.monotonic() - killed < 60
    assert results[lost].returncode == -9
    for index, result in enumerate(results):
        if index != lost:
            assert result.returncode == 1, result.stderr
            told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert len(told) == 1 and told[0].startswith(f"error: Process {lost} of the run") and "Start the same command again" in told[0]
    saved = final_checksums(workdir)["step"]
    results = run_processes(config, workdir, folder / "xdg", count)
    assert [result.returncode for result in results] == [0] * count, results[0].stderr
    assert f"Continuing from checkpoint {saved}." in results[0].stdout


def test_a_locked_workdir_ends_all_processes(folder, single):
    """Only the first process takes the lock."""
    workdir = folder / "locked"
    workdir.mkdir()
    with open(workdir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = run_processes(single[0], workdir, folder / "xdg", 2)
    end_with_one_message_each(results)
    assert "is in use" in results[0].stderr and "Process 0 failed where this one did not" in results[1].stderr


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_all_processes(folder, single):
    """In the middle of the loop, where the other process has started further steps."""
    workdir = folder / "no_log"
    (workdir / "metrics.jsonl").mkdir(parents=True)
    config = single[0].copy_and_resolve_references()
    config.data.eval = None
    results = run_processes(config, workdir, folder / "xdg", 2)
    end_with_one_message_each(results)
    assert "metrics.jsonl: the log could not be written (is a directory)" in results[0].stderr
    assert "Process 0 failed where this one did not" in results[1].stderr


@pytest.mark.slow
def test_a_commit_that_fails_ends_all_processes(folder, single):
    """Only the first process commits, in the background; here it finds a folder where its marker should go."""
    config = single[0].copy_and_resolve_references()
    config.data.eval, config.checkpoint.every = None, 2
    workdir = folder / "no_commit"
    (workdir / "checkpoints/4.unfinished").mkdir(parents=True)
    results = run_processes(config, workdir, folder / "xdg", 2)
    end_with_one_message_each(results)
    assert "(is a directory)" in results[0].stderr and "failed" in results[1].stderr
    shutil.rmtree(workdir)
