"""FLOPs against counts by hand and by brute force."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sft_jax.model.mask import MaskSpec
from sft_jax.model.sharding import make_mesh
from sft_jax.model.splash_attention import splash_attention
from sft_jax.planning.flops import Loops, count_flops

ONE = Loops(attention=1, cross_entropy=1)


def flops(f, *args, loops=ONE):
    return count_flops(jax.make_jaxpr(f)(*args), loops)


def test_a_product_and_its_gradient():
    x, w = jnp.zeros((3, 5, 7)), jnp.zeros((7, 11))
    assert flops(jnp.dot, x, w) == 2 * 3 * 5 * 7 * 11
    assert flops(jax.grad(lambda x, w: jnp.dot(x, w).sum(), argnums=(0, 1)), x, w) == 3 * 2 * 3 * 5 * 7 * 11
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.zeros((2, 3, 4)), jnp.zeros((2, 4, 5))) == 2 * 2 * 3 * 4 * 5


def test_scans_count_their_steps_and_remat_what_it_repeats():
    x, ws = jnp.zeros((4, 8)), jnp.zeros((6, 8, 8))
    product = 2 * 4 * 8 * 8

    def layers(x, ws, wrap=lambda f: f):
        return jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, ws)[0].sum()

    assert flops(layers, x, ws) == 6 * product
    assert flops(jax.grad(layers, argnums=(0, 1)), x, ws) == 6 * 3 * product
    remat = jax.grad(lambda x, ws: layers(x, ws, jax.checkpoint), argnums=(0, 1))
    assert flops(remat, x, ws) == 6 * 4 * product


def test_loops_of_unknown_length_run_as_often_as_is_assumed():
    def loop(n, x, w):
        with jax.named_scope("cross_entropy"):
            return jax.lax.fori_loop(0, n, lambda i, x: x @ w, x)

    assert flops(loop, 3, jnp.zeros((4, 4)), jnp.zeros((4, 4)), loops=Loops(1, 5)) == 5 * 2 * 4**3


def test_grouped_products_count_every_row_once():
    x, kernels, sizes = jnp.zeros((12, 4)), jnp.zeros((3, 4, 5)), jnp.array([2, 7, 3])

    def product(x, kernels):
        return jax.lax.ragged_dot(x, kernels, sizes).sum()

    assert flops(product, x, kernels) == 2 * 12 * 4 * 5
    assert flops(jax.grad(product, argnums=(0, 1)), x, kernels) == 3 * 2 * 12 * 4 * 5


def test_shard_map_counts_all_devices():
    mesh = make_mesh(1, 8, 1)
    run = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    assert flops(run, jnp.zeros((16, 4)), jnp.zeros((4, 4))) == 2 * 16 * 4 * 4


@pytest.mark.parametrize("unrolled", [1, 3])
def test_the_compiler_counts_the_same_where_there_are_no_loops(unrolled):
    x, w = jnp.zeros((64, 64)), jnp.zeros((64, 64))

    def layers(x, w):
        for _ in range(unrolled):
            x = x @ w
        return x

    assert flops(layers, x, w) == jax.jit(layers).lower(x, w).compile().cost_analysis()["flops"]


def test_a_kernel_counts_its_body_at_every_point_of_its_grid():
    """Splash attention says nothing of its work: its blocks of queries and keys, those above the diagonal left out or not."""
    heads, length, size = 2, 1024, 64
    arrays = [jax.ShapeDtypeStruct((1, length, heads, size), jnp.bfloat16)] * 3
    tokens = jnp.zeros((1, length), jnp.int32)
    mask = MaskSpec(tokens, tokens, tokens, tokens, True, None, 1.0, None, 1)
    traced = jax.jit(lambda q, k, v: splash_attention(q, k, v, mask, None)).trace(*arrays)
    full = 2 * 2 * heads * length**2 * size
    assert full / 2 <= count_flops(traced.jaxpr, Loops(1, 1)) <= full
