"""Which GPUs of a shared host a process takes."""

import pytest

from sft_jax.errors import UserError
from sft_jax.training import local_devices
from sft_jax.training.local_devices import describe_host, own_gpus


def host(name: str, gpus: int) -> str:
    return "\n".join((name, "boot", *map(str, range(gpus))))


@pytest.mark.parametrize(
    "hosts, shares",
    [
        ([host("a", 8), host("b", 8)], [None, None]),
        ([host("a", 2), host("b", 2), host("a", 2), host("b", 2)], [[0], [0], [1], [1]]),
        ([host("a", 8), host("a", 8)], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([host("a", 1)] * 4, [None] * 4),
        ([host("a", 0)] * 2, [None, None]),
        (["a\nboot\n0", "a\nboot\n1"], [None, None]),
    ],
    ids=["a process a host", "a process a GPU", "half of the GPUs each", "bound by Slurm", "no GPU", "CUDA_VISIBLE_DEVICES of its own"],
)
def test_shares(hosts, shares):
    assert [own_gpus(hosts, index) for index in range(len(hosts))] == shares


def test_gpus_that_cannot_be_shared_evenly():
    with pytest.raises(UserError, match="3 processes of the run share a host with 8 GPUs.*JAX_LOCAL_DEVICE_IDS"):
        own_gpus([host("a", 8)] * 3, 1)


def test_what_a_process_sees(monkeypatch):
    monkeypatch.setattr(local_devices.glob, "glob", lambda _: ["/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm"])
    assert describe_host({}).split("\n")[2:] == ["/dev/nvidia0", "/dev/nvidia1"]
    assert describe_host({"CUDA_VISIBLE_DEVICES": "3, GPU-5f"}).split("\n")[2:] == ["3", "GPU-5f"]
    assert describe_host({"CUDA_VISIBLE_DEVICES": ""}).split("\n")[2:] == []
