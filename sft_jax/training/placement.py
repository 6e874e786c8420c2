"""Which rows of a batch this process feeds, and how they become arrays over the whole mesh."""

import jax
import numpy as np
from jax.sharding import Mesh

from sft_jax.batch import Batch
from sft_jax.errors import UserError
from sft_jax.model.sharding import batch_sharding


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process feeds the index-th of `count` equal parts of the rows of a micro-batch.

    Rows are split over the mesh axes `data` and `fsdp`. Processes that differ only along `tensor` feed the same rows.
    Raises UserError where the devices of this process hold no contiguous, aligned part.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    here = batch_sharding(mesh).addressable_devices_indices_map((groups,))
    mine = sorted({index[0].indices(groups)[0] for index in here.values()})
    size = len(mine)
    if mine != list(range(mine[0], mine[0] + size)) or mine[0] % size or groups % size:
        raise UserError(
            f"mesh: the devices of process {jax.process_index()} hold the row groups {mine} of {groups}, which are no contiguous "
            "part; choose mesh.data x mesh.fsdp so that every process has the same number of neighbouring groups."
        )
    return mine[0] // size, groups // size


def place_local(batch: Batch, mesh: Mesh, batch_dim: int) -> Batch:
    """Returns the global arrays of which `batch` is this process's part along `batch_dim`, split by rows over the mesh."""
    index, count = row_share(mesh)
    sharding = batch_sharding(mesh, batch_dim)

    def place(local: np.ndarray) -> jax.Array:
        rows = local.shape[batch_dim]
        shape = (*local.shape[:batch_dim], rows * count, *local.shape[batch_dim + 1 :])

        def part(where: tuple[slice, ...]) -> np.ndarray:
            first, stop, _ = where[batch_dim].indices(shape[batch_dim])
            return local[(*where[:batch_dim], slice(first - index * rows, stop - index * rows), *where[batch_dim + 1 :])]

        return jax.make_array_from_callback(shape, sharding, part)

    return Batch(*map(place, batch))


def check_rows(mesh: Mesh, rows: int, key: str) -> None:
    """Raises UserError naming `key` where a batch of `rows` rows does not divide over the mesh."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % groups:
        raise UserError(
            f"{key}: {rows} rows do not divide over mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']}; "
            f"choose a multiple of {groups}, or a smaller mesh."
        )
