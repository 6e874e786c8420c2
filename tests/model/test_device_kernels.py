"""The kernels of TPU and GPU, interpreted on the CPU against the reference, and lowered for their devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from slow_values import slow
from tiny_models import packed_rows

from sft_jax.model.attention import KERNELS, Kernel, attend
from sft_jax.model.context import zigzag_order
from sft_jax.model.flash_attention import flash_attention
from sft_jax.model.mask import MaskSpec
from sft_jax.model.sharding import make_mesh
from sft_jax.model.splash_attention import splash_attention

CASES = {
    "everything": dict(heads=4, kv_heads=2, window=70, soft_cap=2.0, sinks=True),
    "plain": dict(heads=2, kv_heads=2, window=None, soft_cap=None, sinks=False),
    "one kv head": dict(heads=4, kv_heads=1, window=None, soft_cap=None, sinks=True),
    "window": dict(heads=2, kv_heads=1, window=130, soft_cap=None, sinks=False),
}
HIGHEST = jax.lax.Precision.HIGHEST
interpreted_splash = partial(splash_attention, interpret=True)
interpreted_flash = partial(flash_attention, interpret=True)


def inputs(heads, kv_heads, window, soft_cap, sinks, rows=2, length=256, sizes=(16, 8)):
    rng = np.random.default_rng(0)
    _, positions, segments = packed_rows(rng, rows, length)
    shapes = ((heads, sizes[0]), (kv_heads, sizes[0]), (kv_heads, sizes[1]))
    q, k, v = (rng.normal(size=(rows, length, *last)).astype(np.float32) for last in shapes)
    mask = MaskSpec(positions, positions, segments, segments, True, window, sizes[0] ** -0.5, soft_cap, 1)
    return (q * 2, k * 2, v, rng.normal(size=heads).astype(np.float32) if sinks else None), mask


def value_and_gradients(run, args, mask, **keywords):
    *arrays, sinks = args
    wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    weights = np.random.default_rng(1).normal(size=(*arrays[0].shape[:3], arrays[2].shape[-1])).astype(np.float32)
    loss = lambda q, k, v, sinks: jnp.sum(run(q, k, v, mask, precision=HIGHEST, sinks=sinks, **keywords) * weights)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, wanted))(*arrays, sinks)


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("case", ["everything", *slow("plain", "one kv head", "window")])
def test_splash_equals_reference(case):
    args, mask = inputs(**CASES[case])
    assert_same(value_and_gradients(interpreted_splash, args, mask), value_and_gradients(KERNELS["reference"].run, args, mask))


@pytest.mark.parametrize("kv_heads", [1, *slow(2)])
def test_flash_equals_reference(kv_heads):
    args, mask = inputs(2, kv_heads, None, None, False, rows=1, sizes=(16, 16))
    assert_same(value_and_gradients(interpreted_flash, args, mask), value_and_gradients(KERNELS["reference"].run, args, mask))


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 2])
def test_splash_over_a_mesh_equals_reference(context, monkeypatch):
    """Each device has the blocks of its own queries, in zig-zag order."""
    monkeypatch.setitem(KERNELS, "splash", Kernel(interpreted_splash, platform="cpu"))
    mesh = make_mesh(1, -1, 2, jax.devices()[:4], context=context)
    (*states, sinks), mask = inputs(**CASES["everything"], length=512)
    order = zigzag_order(context, 512)
    args = (*(x[:, order] for x in states), sinks)
    positions, segments = mask.key_positions[:, order], mask.key_segments[:, order]
    mask = MaskSpec(positions, positions, segments, segments, True, mask.window, mask.scale, mask.soft_cap, 1)
    expected = value_and_gradients(KERNELS["reference"].run, args, mask)
    assert_same(value_and_gradients(attend, args, mask, kernel="splash", mesh=mesh), expected)


@pytest.mark.parametrize("run", [splash_attention, flash_attention])
def test_rows_that_are_not_packed_give_nan(run):
    """They count distances by index, which is wrong for positions that jump."""
    (q, k, v, _), mask = inputs(**CASES["plain"], sizes=(16, 16))
    positions = np.asarray(mask.query_positions).copy()
    positions[1] = positions[1, ::-1]
    mask = dataclasses.replace(mask, query_positions=positions, key_positions=positions)
    out = np.asarray(jax.jit(partial(run, interpret=True, precision=HIGHEST))(q, k, v, mask))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize(("run", "platform"), [(splash_attention, "tpu"), (flash_attention, "cuda")])
def test_lowers_for_its_device(run, platform):
    (q, k, v, _), mask = inputs(4, 2, None, None, False, length=512, sizes=(64, 64))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    gradient = jax.jit(jax.grad(lambda *a: run(*a, mask, None).astype(jnp.float32).sum(), (0, 1, 2)))
    device = jax.sharding.AbstractDevice(*{"tpu": ("TPU v5 lite", 1, "tpu"), "cuda": ("NVIDIA H100 80GB HBM3", 132, "cuda")}[platform])
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):  # newer Triton lowerings ask which GPU it is
        text = gradient.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("custom_call") >= 3  # the forward pass and the gradients


@pytest.mark.slow
def test_auto_is_splash_on_a_tpu_and_compiles_for_one(monkeypatch):
    """For four chips that are not there, with rows cut over `context`."""
    pytest.importorskip("libtpu", reason="needs pip install libtpu, the compiler for TPUs")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(1, 1, 2, list(chips), context=2)

    def array(dtype, *shape, cut=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(None, *cut)))

    states = [array(jnp.bfloat16, 2, 1024, heads, size, cut=("context", "tensor")) for heads, size in ((8, 80), (2, 80), (2, 48))]
    tokens, sinks = array(jnp.int32, 2, 1024, cut=("context",)), jax.ShapeDtypeStruct((8,), jnp.float32)

    def total(q, k, v, positions, segments, sinks):
        mask = MaskSpec(positions, positions, segments, segments, True, 500, 0.1, 30.0, 1)
        return attend(q, k, v, mask, precision=jax.lax.Precision.DEFAULT, sinks=sinks, mesh=mesh).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(total, (0, 1, 2, 5))).lower(*states, tokens, tokens, sinks)
    assert lowered.compile().as_text().count("tpu_custom_call") == 3  # forward and two backward passes, none of them twice


@pytest.mark.parametrize("name", [pytest.param("splash", marks=pytest.mark.device("tpu")), pytest.param("flash", marks=pytest.mark.device("cuda"))])
def test_equals_reference_on_its_device(name):
    args, mask = inputs(4, 2, None, None, False, length=512, sizes=(64, 64))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in args[:3]]
    out, expected = (
        jax.jit(jax.value_and_grad(lambda *a, run=run: jnp.sin(run(*a, mask, None).astype(jnp.float32)).sum(), (0, 1, 2)))(*arrays)
        for run in (KERNELS[name].run, KERNELS["reference"].run)
    )
    for one, other in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=0.05, rtol=0.05)
