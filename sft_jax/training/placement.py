"""Which rows of a batch this process feeds, and how they become arrays over the whole mesh."""

import jax
import numpy as np
from jax.sharding import Mesh

from sft_jax.batch import Batch
from sft_jax.errors import UserError
from sft_jax.model.sharding import LAYOUT, batch_sharding, pieces_along


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): this process feeds the index-th of `count` equal parts of the rows of a micro-batch.

    Rows are split over the mesh axes of "batch". Processes that differ only along others feed the same rows.
    Raises UserError where the devices of this process hold no contiguous, aligned part.
    """
    groups = pieces_along(mesh, "batch")
    here = batch_sharding(mesh).addressable_devices_indices_map((groups,))
    mine = sorted({index[0].indices(groups)[0] for index in here.values()})
    size = len(mine)
    if mine != list(range(mine[0], mine[0] + size)) or mine[0] % size or groups % size:
        axes = " x ".join(f"mesh.{name}" for name in LAYOUT["batch"])
        raise UserError(
            f"mesh: the devices of process {jax.process_index()} hold the row groups {mine} of {groups}, which are no contiguous "
            f"part; choose {axes} so that every process has the same number of neighbouring groups."
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
    groups = pieces_along(mesh, "batch")
    if rows % groups:
        axes = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in LAYOUT["batch"])
        raise UserError(
            f"{key}: {rows} rows do not divide over {axes}; choose a multiple of {groups}, or a smaller mesh."
        )


def check_length(mesh: Mesh, length: int) -> None:
    """Raises UserError where rows of `length` tokens cannot be cut over `context`."""
    chunks = 2 * mesh.shape["context"]
    if mesh.shape["context"] > 1 and length % chunks:
        raise UserError(
            f"data.max_length: {length} is not divisible by {chunks}, the chunks that mesh.context={mesh.shape['context']} cuts "
            f"a row into; choose {max(length // chunks, 1) * chunks} or {(length // chunks + 1) * chunks}."
        )
