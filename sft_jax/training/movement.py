"""By how much of its norm an update moves the parameters, told from a sample of their numbers.

The exact norm of a change needs the old parameters beside the new ones, and every form of it inside the step (differences,
directions behind a barrier, sums for each array) made XLA keep a copy of all that is trained, where the step otherwise
overwrites it. A sample is taken before the step and after it, and only where a record is written.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.model.sharding import shardings

SAMPLE = 4096  # numbers of each array, over all devices; arrays that have no more are read whole

After = Callable[[nnx.State], jax.Array]


def make_movement(params: nnx.State, mesh: Mesh) -> Callable[[nnx.State], After]:
    """Returns before(params) -> after(params) -> fp32 [], the norm of what has changed in between / the norm before.

    Args:
        params: what is trained, arrays or their shapes, as `shardings` lays them out on the mesh. Later ones are like it.

    Of each array every device reads the same places of its part, evenly spread, and counts them for all that it has. The
    ratio is the same on every process.
    """
    layouts = jax.tree.leaves(shardings(params, mesh))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    parts = [layout.shard_shape(shape) for layout, shape in zip(layouts, shapes, strict=True)]
    places = [spread(part, max(SAMPLE // mesh.size, 1)) for part in parts]
    counts = [len(place[0]) if place else 1 for place in places]
    each = np.concatenate([np.full(count, math.prod(shape) / count, np.float32) for shape, count in zip(shapes, counts, strict=True)])

    def read(*arrays: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.atleast_1d(x[place]).astype(jnp.float32) for x, place in zip(arrays, places, strict=True)])[None]

    sample = jax.jit(
        jax.shard_map(
            read, mesh=mesh, in_specs=tuple(layout.spec for layout in layouts), out_specs=P(mesh.axis_names), check_vma=False
        )
    )  # fmt: skip

    def ratio(before: jax.Array, after: jax.Array) -> jax.Array:
        changed, size = jnp.sum(each * jnp.square(after - before)), jnp.sum(each * jnp.square(before))
        return jnp.where(size > 0, jnp.sqrt(changed / jnp.where(size > 0, size, 1.0)), 0.0)

    compared = jax.jit(ratio, out_shardings=NamedSharding(mesh, P()))

    def begin(params: nnx.State) -> After:
        before = sample(*jax.tree.leaves(params))
        return lambda params: compared(before, sample(*jax.tree.leaves(params)))

    return begin


def spread(shape: tuple[int, ...], count: int) -> tuple[np.ndarray, ...]:
    """Returns the indices, one array an axis, of `count` places spread evenly over an array of this shape, or of all of them.

    The step from one to the next has no factor in common with the size, so that places are all different and in all columns.
    """
    size = math.prod(shape)
    step = max(size // count, 1)
    while math.gcd(step, size) > 1:
        step += 1
    return np.unravel_index(np.arange(min(count, size)) * step % size, shape)
