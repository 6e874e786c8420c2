"""Products with trained matrices, and the sums that are their gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sft_jax.model.product import gathered, grouped_product, product
from sft_jax.model.sharding import constrain_fn, make_mesh

HIGHEST = jax.lax.Precision.HIGHEST
SIZES = (5, 0, 9, 10)  # rows of each kernel


def check_close(found, expected: np.ndarray, dtype) -> None:
    """Within a rounding of `dtype`, and of the float32 in which sums of some dozen numbers are made."""
    np.testing.assert_allclose(exact(found), expected, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-5)


def draw(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def pulled_back(function, *inputs, like):
    y, back = jax.vjp(function, *inputs)
    return y, *back(like.astype(y.dtype))


@pytest.mark.parametrize("shape", [(24, 8), (2, 12, 8)], ids=str)
@pytest.mark.parametrize(("compute", "held"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_gradients_are_sums_in_float32(shape, compute, held):
    rows, matrix, cotangent = draw(*shape, dtype=compute), draw(8, 6, dtype=held, seed=1), draw(*shape[:-1], 6, dtype=compute, seed=2)
    y, of_rows, of_matrix = pulled_back(partial(product, precision=HIGHEST), rows, matrix, like=cotangent)
    flat, back, read = exact(rows).reshape(-1, 8), exact(cotangent).reshape(-1, 6), exact(matrix.astype(compute))
    for found, expected, kind in ((y, flat @ read, compute), (of_rows, back @ read.T, compute), (of_matrix, flat.T @ back, held)):
        assert found.dtype == kind
        check_close(found.reshape(expected.shape), expected, kind)


def ragged(rows, kernels, cotangent):
    """Outputs and gradients in float64, group by group."""
    ends = np.cumsum(SIZES)
    groups = [slice(end - size, end) for end, size in zip(ends, SIZES, strict=True)]
    y = np.concatenate([rows[group] @ kernel for group, kernel in zip(groups, kernels, strict=True)])
    of_rows = np.concatenate([cotangent[group] @ kernel.T for group, kernel in zip(groups, kernels, strict=True)])
    return y, of_rows, np.stack([rows[group].T @ cotangent[group] for group in groups])


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("dimension", [1, 2])
def test_kernels_that_are_gathered_get_back_their_parts_of_a_sum(compute, dimension):
    """Four devices with rows of their own hold a quarter of each kernel; what travels back is not rounded."""
    mesh, axes = make_mesh(2, 2, 1, jax.devices()[:8], context=2), ("fsdp", "context")
    rows, kernels, cotangent = draw(8 * 24, 8, dtype=compute), draw(4, 8, 12, seed=1), draw(8 * 24, 12, dtype=compute, seed=2)
    cut = P(*(axes if place == dimension else None for place in range(3)))
    everywhere = P(mesh.axis_names)

    def local(rows, kernels):
        return grouped_product(rows, gathered(kernels, dimension, axes, rows.dtype), jnp.asarray(SIZES), HIGHEST)

    run = jax.shard_map(local, mesh=mesh, in_specs=(everywhere, cut), out_specs=everywhere, check_vma=False)
    pull = jax.jit(lambda *inputs: pulled_back(run, *inputs[:2], like=inputs[2]))
    y, of_rows, of_kernels = pull(rows, kernels, cotangent)
    read = exact(kernels.astype(compute))
    parts = [ragged(exact(rows)[i * 24 : (i + 1) * 24], read, exact(cotangent)[i * 24 : (i + 1) * 24]) for i in range(8)]
    check_close(y, np.concatenate([part[0] for part in parts]), compute)
    check_close(of_rows, np.concatenate([part[1] for part in parts]), compute)
    check_close(of_kernels, sum(part[2] for part in parts), "float32")


@pytest.mark.parametrize(("compute", "held"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_grouped_products_of_one_device(compute, held):
    rows, kernels, cotangent = draw(24, 8, dtype=compute), draw(4, 8, 12, dtype=held, seed=1), draw(24, 12, dtype=compute, seed=2)
    found = pulled_back(lambda rows, kernels: grouped_product(rows, kernels, jnp.asarray(SIZES), HIGHEST), rows, kernels, like=cotangent)
    expected = ragged(exact(rows), exact(kernels.astype(compute)), exact(cotangent))
    for x, reference, kind in zip(found, expected, (compute, compute, held), strict=True):
        assert x.dtype == kind
        check_close(x, reference, kind)


def test_the_gradient_lies_as_the_parameter_does():
    mesh = make_mesh(1, 4, 2)
    rows, matrix = draw(32, 8), draw(8, 6)

    def gradient(rows, matrix):
        dot = partial(product, axes=("embed", "heads"), precision=HIGHEST, constrain=constrain_fn(mesh))
        return jax.grad(lambda matrix: jnp.sum(jnp.square(dot(rows, matrix))))(matrix)

    found = jax.jit(gradient)(rows, matrix)
    assert found.sharding.spec == P("fsdp", "tensor")
    np.testing.assert_allclose(found, 2 * exact(rows).T @ (exact(rows) @ exact(matrix)), rtol=1e-5, atol=1e-4)
