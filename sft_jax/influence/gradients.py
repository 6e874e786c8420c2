"""The gradient of each example, under a random projection that keeps inner products.

Of a kernel W [in, out] of the blocks, with gradient G, what is computed is P^T G Q with random P [in, r] and Q [out, k], whose
entries have the variance 1 / r and 1 / k: the expectation of <P^T G Q, P^T H Q> is <G, H> (Choe et al. 2024, "LoGra",
arXiv:2405.13954, section 3.1). P^T G is the gradient of the second matrix of a LoRA adapter whose first one is P, as it is when
the second is zero, so nothing of the size of W is ever made for an example, and the projections of all layers cost what training a LoRA
adapter does. LESS (Xia et al. 2024, arXiv:2402.04333) projects the gradients of such adapters.

Letters: N rows, L length, F numbers of a projected gradient.
"""

import zlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.batch import Batch
from sft_jax.model.adapters import AdapterPlan, ModulePlan, block_projections, kernel_values
from sft_jax.model.attach import attach
from sft_jax.model.decoder import Decoder
from sft_jax.model.layers import Linear
from sft_jax.model.loss import next_token_loss

RANK, WIDTH = 8, 32  # r and k: of every kernel 256 numbers are left


def make_gradients(decoder: Decoder, seed: int, rank: int = RANK, width: int = WIDTH) -> Callable[[Batch], jax.Array]:
    """Returns the compiled function Batch [N, L] -> projected gradients of the loss of each row, fp32 [N, F].

    The loss of a row is the sum of weight * nll over it, so a row should hold one document; rows without weight give zeros. The
    projection depends on `seed`, the paths and the shapes of kernels only. `decoder` carries no adapters; its projections are
    those of its blocks but for experts. With several devices rows are shared by them, N being a multiple of their number, and
    each has a copy of the parameters.
    """
    graphdef, moved, rest = nnx.split(_with_projections(decoder, seed, rank), _is_moved, ...)
    key, devices, mesh = jax.random.key(seed), jax.devices(), None
    if len(devices) > 1:
        mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
        moved, rest, key = jax.device_put((moved, rest, key), NamedSharding(mesh, P()))
    return partial(_gradients, graphdef, width, mesh, moved, rest, key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _gradients(
    graphdef: nnx.GraphDef, width: int, mesh: Mesh | None, moved: nnx.State, rest: nnx.State, key: jax.Array, rows: Batch
) -> jax.Array:
    def loss(moved: nnx.State, rest: nnx.State, row: Batch) -> jax.Array:
        batch = jax.tree.map(lambda values: values[None], row)
        return next_token_loss(nnx.merge(graphdef, moved, rest), batch).total

    def projected(moved: nnx.State, rest: nnx.State, key: jax.Array, row: Batch) -> jax.Array:
        gradient = jax.grad(loss)(moved, rest, row)
        return jnp.concatenate([_narrowed(path, values, key, width) for path, values in nnx.to_flat_state(gradient)])

    of_rows = jax.vmap(projected, in_axes=(None, None, None, 0))
    if mesh is not None:
        of_rows = jax.shard_map(of_rows, mesh=mesh, in_specs=(P(), P(), P(), P("rows")), out_specs=P("rows"), check_vma=False)
    return of_rows(moved, rest, key, rows)


def _with_projections(decoder: Decoder, seed: int, rank: int) -> Decoder:
    """Returns the decoder with adapters whose first matrix is the projection P and whose second is zero."""
    modules = [(path, kernel_values(node)) for path, node in block_projections(decoder) if isinstance(node, Linear)]
    plans = tuple(
        ModulePlan(path, min(rank, *values.shape[-2:]), scale=1.0, magnitude=False, start=False) for path, values in modules
    )
    adapted = attach(decoder, AdapterPlan(plans, 0.0, (), (), (), False), jax.random.key(seed))
    for path, node in block_projections(adapted):
        if isinstance(node, Linear):
            a = node.adapter.a.get_value()
            node.adapter.a.set_value(_signs(jax.random.key(seed), f"{path}.a", a.shape) * a.shape[-1] ** -0.5)
    return adapted


def _is_moved(path: tuple, value) -> bool:
    return path[-2:] == ("adapter", "b")


def _narrowed(path: tuple, values: nnx.Variable, key: jax.Array, width: int) -> jax.Array:
    """Returns P^T G [..., r, out] as P^T G Q, in one dimension."""
    gradient = values.get_value() if isinstance(values, nnx.Variable) else values
    if gradient.shape[-1] > width:
        signs = _signs(key, ".".join(map(str, path)), (gradient.shape[-1], width))
        gradient = jnp.matmul(gradient, signs * width**-0.5, precision=jax.lax.Precision.HIGHEST)
    return gradient.reshape(-1)


def _signs(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.rademacher(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.float32)
