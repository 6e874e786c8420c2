"""In which order devices lie in a mesh: fast links along the axes that talk most, the network between slices along others."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from sft_jax.errors import UserError

OVER_SLICES = ("data", "fsdp", "expert", "context")  # axes along which slices may lie, each as far as it goes


def arranged(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> np.ndarray:
    """Returns the devices in an array of `sizes`, by axis, which multiply to their number.

    Within a slice (a TPU slice, or the GPUs of one NVLink domain) the order is that of `mesh_utils`, which knows how links
    run. Several slices lie along `data`, and where there are more of them than it divides along the next of
    OVER_SLICES. Raises UserError where that leaves some for `tensor`, which talks several times in every layer.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    over = slices_along(sizes, slices)
    within = [size // over[axis] for axis, size in sizes.items()]
    return mesh_utils.create_hybrid_device_mesh(within, list(over.values()), devices, allow_split_physical_axes=True)


def slices_along(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Returns how many of `slices` slices, or nodes of GPUs, lie along each axis of a mesh. Raises UserError as `arranged` does."""
    over = dict.fromkeys(sizes, 1)
    left = slices
    for axis in OVER_SLICES:
        over[axis] = math.gcd(left, sizes[axis])
        left //= over[axis]
    if left > 1:
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"{asked}: {slices} slices or nodes are joined by a network, over which mesh.tensor cannot lie; make mesh.data a multiple of "
            f"{slices}, or mesh.data x mesh.fsdp."
        )
    return over
