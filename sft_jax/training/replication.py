"""A layout that leaves much of the state in copies is refused before anything is loaded."""

import math

import jax

from sft_jax.errors import UserError
from sft_jax.model.sharding import AnyMesh, largest_replicated

SMALL = 2**31  # bytes a device that are never too much, such as the sides of adapters that only the hidden size would cut
_NAMED = 4


def check_replication(state, mesh: AnyMesh, most: float) -> None:
    """Raises UserError where copies are more than the share `most` of what each device holds of `state`.

    A copy is an array, or a part of one, that several devices hold along another mesh axis than `data`, which is there for
    copies. `state` may be abstract; its arrays have shardings.
    """
    copies = [row for row in largest_replicated(state, mesh, count=None) if set(row.over) - {"data"}]
    copied = sum(row.bytes_per_device for row in copies)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    if copied <= max(SMALL, most * held):
        return
    named = "; ".join(
        f"{row.path} ({row.bytes_per_device / 2**20:,.0f} MiB, along {', '.join(axis for axis in row.over if axis != 'data')})"
        for row in copies[:_NAMED]
    )
    more = f" and {len(copies) - _NAMED} more" if len(copies) > _NAMED else ""
    raise UserError(
        f"train.max_replicated: {copied / held:.0%} of what each device holds ({copied / 2**20:,.0f} of "
        f"{held / 2**20:,.0f} MiB) are copies of what others hold, and {most:.0%} may be: {named}{more}. Move devices from "
        "these axes to mesh.fsdp, which cuts every kernel, or raise train.max_replicated."
    )
