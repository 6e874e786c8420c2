"""Checkpoints: exact, verified to the last byte, atomic, kept in number, and the same on every mesh."""

import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sft_jax.errors import StoppedBySignal, UserError
from sft_jax.checkpoint import checkpoints as checkpoint_lib
from sft_jax.checkpoint import manifest as manifest_lib
from sft_jax.checkpoint.checkpoints import Checkpoints, DamagedCheckpoint, committed_steps, flatten_state, restore, unflatten_state, verify
from sft_jax.checkpoint.integrity import checksums
from sft_jax.checkpoint.manifest import read_manifest


def mesh_of(size: int) -> jax.sharding.Mesh:
    return jax.make_mesh((size,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def state_on(mesh) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    rows, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    return {
        "params/kernel": jax.device_put(rng.normal(size=(64, 24)).astype(np.float32), rows),
        "opt_state/mu": jax.device_put(rng.normal(size=(64, 24)).astype(jnp.bfloat16), rows),
        "params/scale": jax.device_put(rng.normal(size=(24,)).astype(np.float32), whole),
        "step": jax.device_put(np.int32(7), whole),
    }


def abstract(state):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in state.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One committed checkpoint, saved on eight devices."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(7, state_on(mesh_of(8)), {"position": 56})
    checkpoints.close()
    return folder / "7"


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_restores_bit_equal_on_any_mesh(saved, devices):
    like = state_on(mesh_of(devices))
    manifest, arrays = verify(saved), restore(saved, abstract(like))
    assert manifest["position"] == 56 and manifest["step"] == 7
    assert_same(arrays, like)
    assert all(arrays[name].sharding == like[name].sharding for name in like)


def test_a_relative_folder_is_as_good(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    like = state_on(mesh_of(1))
    assert_same(restore(Path("7"), abstract(like)), like)


def test_checksums_do_not_depend_on_the_mesh_and_see_every_bit():
    reference = checksums(state_on(mesh_of(1)))
    assert checksums(state_on(mesh_of(8))) == reference
    kernel = np.asarray(state_on(mesh_of(1))["params/kernel"])
    for index, bit in [((0, 0), 0), ((63, 23), 31), ((17, 5), 12)]:
        changed = kernel.copy()
        changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
        assert checksums({"x": changed})["x"] != checksums({"x": kernel})["x"]
    swapped = kernel.copy()
    swapped[[3, 9]] = swapped[[9, 3]]
    assert checksums({"x": swapped})["x"] != checksums({"x": kernel})["x"]


def test_any_byte_changed_cut_or_missing_is_noticed_and_named(saved, tmp_path):
    folder = tmp_path / "7"
    shutil.copytree(saved, folder)
    rng = np.random.default_rng(1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        original = path.read_bytes()
        damaged = []
        for _ in range(5):
            flipped = bytearray(original)
            flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(flipped))
        damaged += [original[: len(original) // 2], b"", None, original + b"\0"]
        for content in damaged:
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            with pytest.raises(DamagedCheckpoint, match=path.name):
                verify(folder)
            path.write_bytes(original)
    (folder / "arrays" / "extra").write_bytes(b"x")
    with pytest.raises(DamagedCheckpoint, match="extra"):
        verify(folder)


def test_what_reaches_the_devices_is_checked_too(saved, monkeypatch):
    """A fault between the disk and the shards, which no digest of a file can see."""
    like = state_on(mesh_of(2))
    read = ocp.PyTreeCheckpointer.restore

    def faulty(*args, **kwargs):
        arrays = read(*args, **kwargs)
        return arrays | {"params/scale": arrays["params/scale"].at[3].add(1e-3)}

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", faulty)
    with pytest.raises(DamagedCheckpoint, match="params/scale"):
        restore(saved, abstract(like))


def test_keeps_the_newest_and_saves_a_step_once(tmp_path):
    state = state_on(mesh_of(2))
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 3):
        checkpoints.save(step, state, {"position": step})
    checkpoints.close()
    assert committed_steps(tmp_path) == [2, 3]
    assert verify(tmp_path / "3")["position"] == 3


def test_a_save_that_was_cut_short_does_not_exist(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "7")
    shutil.copytree(saved, tmp_path / "9")
    (tmp_path / "9" / "manifest.json").unlink()  # the commit never came
    (tmp_path / "9" / "arrays.orbax-checkpoint-tmp").mkdir()
    for step in (7, 9, 11):  # 7: a kill between commit and unmarking; 11: one before the folder was made
        (tmp_path / f"{step}.unfinished").touch()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [7] and checkpoints.removed == [9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7"]
    verify(tmp_path / "7")


def test_only_what_a_save_left_is_removed(saved, tmp_path):
    """Folders of the user's stay, and a step that has lost its manifest is damage, not a save that was cut short."""
    for name in ("7", "8", "best", "7.backup", "007", "notes.unfinished"):
        shutil.copytree(saved, tmp_path / name)
    (tmp_path / "8/manifest.json").unlink()
    before = sorted(path for path in tmp_path.rglob("*"))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.removed == [] and checkpoints.steps() == [7, 8] and committed_steps(tmp_path) == [7]
        assert sorted(path for path in tmp_path.rglob("*")) == before
        with pytest.raises(DamagedCheckpoint, match="8/manifest.json cannot be read"):
            verify(tmp_path / "8")
        checkpoints.save(10, state_on(mesh_of(1)), {})
    assert {path.name for path in tmp_path.iterdir()} == {"8", "10", "best", "7.backup", "007", "notes.unfinished"}


def test_a_kill_while_an_old_step_is_removed_is_no_damage(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state_on(mesh_of(1)), {})

    def killed(path):
        raise InterruptedError

    monkeypatch.setattr(checkpoint_lib, "remove_tree", killed)
    with pytest.raises(InterruptedError), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state_on(mesh_of(1)), {})
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.removed == [1] and checkpoints.steps() == [2]


def test_a_file_that_cannot_be_read_is_damage(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "7")
    digests = read_manifest(tmp_path / "7")["files"]
    victim = next(iter(sorted(digests)))
    (tmp_path / "7" / victim).unlink()
    (tmp_path / "7" / victim).mkdir()
    with pytest.raises(DamagedCheckpoint, match=victim):
        verify(tmp_path / "7")


def test_a_disk_that_fails_while_reading_is_damage(saved, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(manifest_lib, "file_digest", broken)
    with pytest.raises(DamagedCheckpoint, match=r"cannot be read \(Input/output error\)"):
        verify(saved)


def test_what_was_saved_last_is_not_asked_of_the_disk(tmp_path, monkeypatch):
    """Of several processes one may see a commit before another does; asked twice for a step, all must do the same."""
    may_end = threading.Event()
    monkeypatch.setattr(manifest_lib, "write_manifest", lambda folder, body: may_end.wait(60))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state_on(mesh_of(1)), {})
        assert checkpoints.last == 3 and committed_steps(tmp_path) == []
        may_end.set()
        checkpoints.save(3, state_on(mesh_of(1)), {})
        assert checkpoints._pending is None  # no second save was begun


def test_the_end_waits_for_the_save_also_after_an_error(tmp_path, monkeypatch):
    """Else another start would take the lock while this one still writes."""
    write = manifest_lib.write_manifest

    def slow(folder, body):
        time.sleep(0.5)
        write(folder, body)

    monkeypatch.setattr(manifest_lib, "write_manifest", slow)
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state_on(mesh_of(1)), {})
        raise ZeroDivisionError
    assert committed_steps(tmp_path) == [1] and not any(thread.name.startswith("commit") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("error", "shown"),
    [(UserError("step 3 is bad."), "step 3 is bad. And: .*no space left"), (StoppedBySignal("the state is saved"), "no space left")],
)
def test_a_save_that_fails_is_told_beside_the_error_that_ends_the_run(tmp_path, monkeypatch, error, shown):
    def full(folder, body):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_lib, "write_manifest", full)
    with pytest.raises(UserError, match=shown), Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state_on(mesh_of(1)), {})
        raise error


def test_set_aside_keeps_the_damaged_one_out_of_the_way(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "7")
    checkpoints = Checkpoints(tmp_path, keep=2)
    place = checkpoints.set_aside(7)
    assert checkpoints.steps() == [] and place.is_dir()
    checkpoints.close()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.removed == [] and place.is_dir() and checkpoints.aside() == [place]


def test_another_model_is_not_damage(saved):
    like = abstract(state_on(mesh_of(1)))
    like["params/bias"] = like["params/scale"]
    like["params/kernel"] = jax.ShapeDtypeStruct((64, 25), jnp.float32, sharding=like["params/kernel"].sharding)
    with pytest.raises(UserError, match=r"params/bias.*params/kernel.*another --workdir"):
        restore(saved, like)


def test_parts_can_be_restored(saved):
    like = {name: x for name, x in state_on(mesh_of(1)).items() if name.startswith("params/")}
    assert_same(restore(saved, abstract(like)), like)


def test_a_full_disk_in_the_background_is_one_message(tmp_path, monkeypatch):
    def full(path, body):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state_on(mesh_of(1)), {})
    checkpoints.wait()
    monkeypatch.setattr(manifest_lib, "write_manifest", full)
    checkpoints.save(2, state_on(mesh_of(1)), {})
    with pytest.raises(UserError, match="no space left.*start the same command again"):
        checkpoints.wait()
    checkpoints.close()
    assert committed_steps(tmp_path) == [1]


def test_saving_does_not_race_with_donation(tmp_path):
    """The step after a save donates the state's buffers while the save still runs in the background."""
    state = state_on(mesh_of(8))
    before = {name: np.asarray(x).copy() for name, x in state.items()}
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = bump(state)
    checkpoints.close()
    assert_same(restore(tmp_path / "1", abstract(state)), before)


def test_flatten_is_inverse_of_unflatten():
    tree = {"a": [np.arange(3), {"b": np.ones(2)}], "c": (np.zeros(1),)}
    flat = flatten_state(tree)
    assert set(flat) == {"a/0", "a/1/b", "c/0"}
    again = unflatten_state(tree, flat)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
