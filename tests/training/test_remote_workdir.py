"""A run whose folder is in an object store: stopped, gone on with on another machine, damaged, taken over."""

import json
import logging
import shutil
import threading

import pytest
from etils import epath
from object_store import object_store
from several_processes import run_processes
from tiny_run import final_checksums, metrics, tiny_config

from sft_jax import fit
from sft_jax.checkpoint import storage
from sft_jax.checkpoint.manifest import committed_steps
from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.training.remote_workdir import RemoteWorkdir
from sft_jax.training.watchdog import Watchdog


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module", autouse=True)
def store():
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    with object_store() as variables:
        yield variables


@pytest.fixture
def machine(folder, monkeypatch):
    """Makes this process one on a machine whose disk holds nothing of the run."""

    def new(name: str):
        shutil.rmtree(folder / name, ignore_errors=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / name))

    new("first")
    return new


@pytest.fixture(scope="module")
def local(folder):
    """The same run on a disk, never stopped."""
    fit(tiny_config(folder, train__steps=6), folder / "local")
    return folder / "local"


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine_bit_for_bit(folder, machine, local, capsys):
    url = "gs://bucket/runs/moved"
    with pytest.raises(StoppedBySignal, match="after step 3 of 6"):
        fit(tiny_config(folder, train__steps=6, train__stop_after_steps=3), url)
    machine("second")
    summary = fit(tiny_config(folder, train__steps=6, train__export=True), url)
    output = capsys.readouterr().out
    assert "Continuing from checkpoint 3." in output and f"Summary: {url}/summary.json" in output and f"lies in {url}/export." in output
    place = epath.Path(url)
    assert final_checksums(place) == final_checksums(local) and metrics(place) == metrics(local)
    assert committed_steps(place / "checkpoints") == committed_steps(local / "checkpoints")  # older ones are gone
    assert json.loads((place / "summary.json").read_text())["steps"] == summary["steps"] == 6
    assert (place / "export/model.safetensors").exists() and (place / "export/config.json").exists()
    machine("third")
    assert fit(tiny_config(folder, train__steps=6, train__export=True), url)["steps"] == 6
    assert f"Its summary is {url}/summary.json" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_object_is_named_and_the_checkpoint_before_it_used(folder, machine, local, capsys):
    url = epath.Path("gs://bucket/runs/damaged")
    with pytest.raises(StoppedBySignal):
        fit(tiny_config(folder, train__steps=6, train__stop_after_steps=5), str(url))
    victim = next(name for name in storage.digests(url / "checkpoints/5") if "/d/" in name)
    place = url / "checkpoints/5" / victim
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(bytes(content))
    # What a kill leaves: a step that is marked and has no manifest.
    (url / "checkpoints/6/arrays/d/x").write_bytes(b"half")
    (url / "checkpoints/6.unfinished").write_bytes(b"")
    fit(tiny_config(folder, train__steps=6), str(url))
    output = capsys.readouterr().out
    assert "Checkpoint 5 is damaged" in output and victim.rpartition("/")[2] in output and "Continuing from checkpoint 4." in output
    assert "Removed checkpoint 6" in output and (url / "checkpoints/5.damaged/manifest.json").exists()
    assert final_checksums(url) == final_checksums(local) and metrics(url) == metrics(local)


@pytest.mark.slow
def test_two_processes_write_their_parts_of_a_checkpoint(folder, local):
    """Each on a disk of its own, as on two hosts: they stop, and go on from what only the store holds."""
    url = "gs://bucket/runs/of_two"
    # Eight devices here, four in each of the two; of one process alone the checkpoints are those of `local`.
    config = tiny_config(folder, train__steps=6, train__stop_after_steps=3)
    for attempt, code in enumerate((75, 0)):
        results = run_processes(config, url, folder / "xdg", 2, lambda index: {"XDG_CACHE_HOME": str(folder / f"host{index}_{attempt}")})
        assert [result.returncode for result in results] == [code] * 2, results[0].stderr + results[1].stderr
        config.train.stop_after_steps = 0
    assert "Continuing from checkpoint 3." in results[0].stdout
    place = epath.Path(url)
    found, expected = final_checksums(place), final_checksums(local)
    assert (found["step"], found["position"], found["arrays"].keys()) == (expected["step"], expected["position"], expected["arrays"].keys())
    for ours, theirs in zip(metrics(place), metrics(local), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_the_last_start_of_a_run_wins(machine):
    url = "gs://bucket/runs/twice"
    first = RemoteWorkdir(url, 0)
    first.write_json("config.json", {"a": 1})
    first.publish()
    first.close()
    machine("second")
    second = RemoteWorkdir(url, 0)
    assert second.read_json("config.json") == {"a": 1}
    with pytest.raises(UserError, match=f"{url}: was taken over by process .* which was started later"):
        first.publish()
    second.publish()
    second.close()


def test_only_what_changed_is_copied(machine, monkeypatch):
    work = RemoteWorkdir("gs://bucket/runs/copied", 0)
    copied = []
    upload = storage.upload
    monkeypatch.setattr("sft_jax.training.remote_workdir.upload", lambda path, to: (copied.append(path.name), upload(path, to)))
    work.write_json("config.json", {})
    work.append_lines("metrics.jsonl", [{"step": 1}])
    work.publish()
    work.append_lines("metrics.jsonl", [{"step": 2}])
    work.publish()
    assert sorted(copied) == ["config.json", "metrics.jsonl", "metrics.jsonl"]
    assert (epath.Path("gs://bucket/runs/copied") / "metrics.jsonl").read_text().count("\n") == 2
    work.remove("config.json")
    assert not (epath.Path("gs://bucket/runs/copied") / "config.json").exists()
    work.close()


def test_stacks_of_a_step_that_hangs_are_in_the_store_at_once(machine, monkeypatch, capfd):
    """A run that hangs saves no more, and only the first process publishes."""
    work, shared = RemoteWorkdir("gs://bucket/runs/hangs", 1), threading.Event()
    share = RemoteWorkdir.share
    monkeypatch.setattr(RemoteWorkdir, "share", lambda self, name: (share(self, name), shared.set()))
    with Watchdog(work, "stacks/process_1.txt", 0.1) as watchdog:
        watchdog.step_ended()
        assert shared.wait(30)
    assert "test_stacks_of_a_step" in (epath.Path("gs://bucket/runs/hangs") / "stacks/process_1.txt").read_text()
    assert "gs://bucket/runs/hangs/stacks/process_1.txt" in capfd.readouterr().err
    work.close()


@pytest.mark.parametrize(
    "url, words",
    [("gs://bucket", "must name a folder in a bucket"), ("ftp://host/run", "neither a folder on a disk nor in gs://"), ("gs://no-such-bucket/run", "gs://no-such-bucket/run: the object store")],
)
def test_wrong_urls_are_one_message(folder, machine, url, words):
    with pytest.raises(UserError, match=words):
        fit(tiny_config(folder), url)
