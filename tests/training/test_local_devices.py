"""Which GPUs of a shared host a process takes."""

import pytest

from sft_jax.errors import UserError
from sft_jax.training import local_devices
from sft_jax.training.local_devices import describe_host, own_gpus


def host(name: str, gpus: int) -> str:
    return "\n".join((name, "boot", "/dev/nvidia0", *map(str, range(gpus))))


@pytest.mark.parametrize(
    "hosts, shares",
    [
        ([host("a", 8), host("b", 8)], [None, None]),
        ([host("a", 2), host("b", 2), host("a", 2), host("b", 2)], [[0], [0], [1], [1]]),
        ([host("a", 8), host("a", 8)], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([host("a", 1)] * 4, [None] * 4),
        ([host("a", 0)] * 2, [None, None]),
        (["a\nboot\n\n0", "a\nboot\n\n1"], [None, None]),
    ],
    ids=["a process a host", "a process a GPU", "half of the GPUs each", "bound by Slurm", "no GPU", "CUDA_VISIBLE_DEVICES of its own"],
)
def test_shares(hosts, shares):
    assert [own_gpus(hosts, index) for index in range(len(hosts))] == shares


def test_gpus_that_cannot_be_shared_evenly():
    with pytest.raises(UserError, match="3 processes of the run share a host with 8 GPUs.*JAX_LOCAL_DEVICE_IDS"):
        own_gpus([host("a", 8)] * 3, 1)


@pytest.fixture
def gpu_files(monkeypatch):
    """Makes a machine with four GPUs; gives what says which of their files a process may open."""
    names = ["/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm", "/dev/nvidia2", "/dev/nvidia3"]
    monkeypatch.setattr(local_devices.glob, "glob", lambda _: names)

    def allow(*numbers: int) -> None:
        monkeypatch.setattr(local_devices.os, "access", lambda path, mode: path in {f"/dev/nvidia{number}" for number in numbers})

    return allow


def test_what_a_process_sees(gpu_files):
    gpu_files(0, 1)
    assert describe_host({}).split("\n")[3:] == ["/dev/nvidia0", "/dev/nvidia1"]
    assert describe_host({"CUDA_VISIBLE_DEVICES": "3, GPU-5f"}).split("\n")[3:] == ["3", "GPU-5f"]
    assert describe_host({"CUDA_VISIBLE_DEVICES": ""}).split("\n")[3:] == []


def test_tasks_whose_cgroups_give_each_its_own_gpus_keep_all_of_them(gpu_files):
    """Slurm's --gpus-per-task=2: both tasks see 0 and 1, and may open other files."""
    hosts = []
    for own in ((0, 1), (2, 3)):
        gpu_files(*own)
        hosts.append(describe_host({"CUDA_VISIBLE_DEVICES": "0,1"}))
    assert [own_gpus(hosts, index) for index in range(2)] == [None, None]
    gpu_files(0, 1, 2, 3)  # without cgroups, and without GPUs of their own
    hosts = [describe_host({"CUDA_VISIBLE_DEVICES": "0,1"})] * 2
    assert [own_gpus(hosts, index) for index in range(2)] == [[0], [1]]
