"""The order of devices in a mesh, with devices of slices that are not there."""

from dataclasses import dataclass

import numpy as np
import pytest

from sft_jax.errors import UserError
from sft_jax.model.devices import arranged


@dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "imagined"


def devices(slices: int, each: int) -> list[Device]:
    """In an order in which slices are mixed."""
    return [Device(i, i % slices, i % slices) for i in range(slices * each)]


def sizes(**asked) -> dict[str, int]:
    return {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1} | asked


def slices_along(array: np.ndarray, axis: int) -> int:
    """How many slices a device meets along one axis, itself included, at most."""
    slice_of = np.vectorize(lambda device: device.slice_index)(array)
    return max(len(set(line)) for line in np.moveaxis(slice_of, axis, -1).reshape(-1, array.shape[axis]).tolist())


@pytest.mark.parametrize(
    ("slices", "asked", "met"),
    [
        (1, dict(fsdp=4, tensor=2), (1, 1, 1, 1, 1)),
        (2, dict(data=2, fsdp=2, tensor=2), (2, 1, 1, 1, 1)),
        (2, dict(fsdp=4, context=2), (1, 2, 1, 1, 1)),
        (4, dict(data=2, fsdp=4, expert=2), (2, 2, 1, 1, 1)),
        (2, dict(data=4, tensor=4), (2, 1, 1, 1, 1)),
        (2, dict(context=4, tensor=2), (1, 1, 1, 2, 1)),
    ],
)
def test_slices_lie_along_the_axes_that_talk_least(slices, asked, met):
    asked = sizes(**asked)
    count = np.prod(list(asked.values()))
    array = arranged(devices(slices, count // slices), asked)
    assert array.shape == tuple(asked.values()) and len(set(array.flat)) == count
    assert tuple(slices_along(array, axis) for axis in range(5)) == met
    if met[0] == slices:  # the parts of a slice are neighbours, so that its processes feed rows that are
        first = [device.slice_index for device in array[:, 0, 0, 0, 0]]
        assert first == sorted(first)


def test_tensor_over_slices_is_refused():
    with pytest.raises(UserError, match="mesh.tensor=4: 2 slices or nodes are joined by a network.*make mesh.data a multiple of 2"):
        arranged(devices(2, 2), sizes(tensor=4))
