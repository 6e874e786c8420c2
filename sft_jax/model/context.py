"""Rows cut along their length over the mesh axis `context`: which device holds which tokens, and how they get there.

Later tokens see more than earlier ones, so stretches of a row cost unequally. A row is therefore cut into 2n chunks, and
device i of n holds the chunks i and 2n - 1 - i (zig-zag order, as Llama 3 was trained, arXiv:2407.21783, section 3.3.2).
Only the blocks of a decoder work in this order; before and after them every device holds a stretch of each row.

Letters: B rows, L length, n devices along `context`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sft_jax.model.sharding import TOKENS, AnyMesh, mesh_axes_for

AXIS = "context"


def context_parts(mesh: AnyMesh | None, length: int) -> int:
    """Returns how many devices share the queries of a row of `length` tokens; 1 where it cannot be cut into 2n chunks."""
    parts = 1 if mesh is None else mesh.shape[AXIS]
    return parts if length % (2 * parts) == 0 else 1


def to_zigzag(x: jax.Array, mesh: AnyMesh | None) -> jax.Array:
    """Returns x [B, L, ...] with its tokens in zig-zag order over the devices; x itself where rows are not cut."""
    return _exchange(_deal, x, mesh)


def from_zigzag(x: jax.Array, mesh: AnyMesh | None) -> jax.Array:
    """The inverse of `to_zigzag`."""
    return _exchange(_collect, x, mesh)


def own_indices(parts: int, length: int) -> jax.Array:
    """Returns int32 [L / parts]: where in the row this device's tokens stand. Called on each device, in a shard_map."""
    return jnp.asarray(zigzag_order(parts, length).reshape(parts, -1))[jax.lax.axis_index(AXIS)]


def zigzag_order(parts: int, length: int) -> np.ndarray:
    """Returns int32 [L], the tokens of a row as they lie over devices: the chunks 0 and 2n - 1, then 1 and 2n - 2, and so on."""
    chunks = np.arange(length, dtype=np.int32).reshape(2, parts, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def gather_rows(x: jax.Array, parts: int) -> jax.Array:
    """Returns the whole rows [B, L, ...], in their order, of parts [B, L / parts, ...] in zig-zag order; in a shard_map."""
    with jax.named_scope(TOKENS):
        x = jax.lax.all_gather(x, AXIS, axis=1)  # [B, n, L / n, ...]
    chunks = x.reshape(x.shape[0], parts, 2, x.shape[2] // 2, *x.shape[3:])
    ordered = jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
    return ordered.reshape(x.shape[0], -1, *x.shape[3:])


def _exchange(move, x: jax.Array, mesh: AnyMesh | None) -> jax.Array:
    parts = context_parts(mesh, x.shape[1])
    if parts == 1:
        return x
    cut = P(mesh_axes_for(mesh, "batch", x.shape[0]), AXIS)
    return jax.shard_map(partial(move, parts), mesh=mesh, in_specs=cut, out_specs=cut)(x)


def _holder(parts: int, chunk: int) -> int:
    return min(chunk, 2 * parts - 1 - chunk)


# Of the two chunks that a device holds one has an even number, in either order: the even ones travel together, and so do
# the odd ones, each to another device.
def _routes(parts: int) -> list[list[tuple[int, int]]]:
    return [[(here, _holder(parts, 2 * here + odd)) for here in range(parts)] for odd in (0, 1)]


def _deal(parts: int, x: jax.Array) -> jax.Array:
    even, odd = (
        jax.lax.ppermute(half, AXIS, route) for half, route in zip(jnp.split(x, 2, axis=1), _routes(parts), strict=True)
    )
    return _by_parity(even, odd)


def _collect(parts: int, x: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=1)
    halves = jnp.split(_by_parity(first, second), 2, axis=1)
    back = [[(there, here) for here, there in route] for route in _routes(parts)]
    return jnp.concatenate([jax.lax.ppermute(half, AXIS, route) for half, route in zip(halves, back, strict=True)], axis=1)


def _by_parity(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x and y one after the other, on odd devices y and x."""
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.concatenate([jnp.where(is_even, x, y), jnp.where(is_even, y, x)], axis=1)
