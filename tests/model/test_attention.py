"""The kernels against a brute-force softmax in float64, and what the blocked one skips."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kernels import ANYWHERE
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import packed_rows

from sft_jax.errors import UserError
from sft_jax.model.attention import KERNELS, attend, choose_kernel
from sft_jax.model.blocked_attention import _blocks, _edges, _key_blocks, _Side, _Static, blocked_attention
from sft_jax.model.mask import MaskSpec, segment_positions
from sft_jax.model.sharding import make_mesh

CASES = {
    "plain": dict(length=70, heads=4, kv_heads=2, window=None, soft_cap=None),
    "window of a block": dict(length=64, heads=2, kv_heads=1, window=16, soft_cap=None),
    "soft cap": dict(length=45, heads=6, kv_heads=2, window=None, soft_cap=2.0),
    "all": dict(length=61, heads=4, kv_heads=1, window=23, soft_cap=1.5),
    "shorter than a block": dict(length=9, heads=2, kv_heads=2, window=4, soft_cap=None),
}


def small_blocks(*args, **kwargs):
    return blocked_attention(*args, **kwargs, block=16)[0]


OUTPUTS = {name: KERNELS[name].run for name in ANYWHERE}
jitted = jax.jit(attend, static_argnums=(4, 5))
compiled = jax.jit(partial(small_blocks, precision=jax.lax.Precision.HIGHEST))


def inputs(length, heads, kv_heads, window, soft_cap, rows=2, size=8, seed=0):
    rng = np.random.default_rng(seed)
    _, positions, segments = packed_rows(rng, rows, length)
    sizes = ((heads, size), (kv_heads, size), (kv_heads, size + 4))  # values may be of another size than keys
    q, k, v = (rng.normal(size=(rows, length, *last)).astype(np.float32) for last in sizes)
    mask = MaskSpec(positions, positions, segments, segments, True, window, size**-0.5, soft_cap, 1)
    return (q * 2, k * 2, v), mask


def brute_force(q, k, v, mask: MaskSpec):
    """One query, head and row at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(*q.shape[:3]):
        distance = mask.query_positions[b, i] - mask.key_positions[b]
        seen = (mask.key_segments[b] == mask.query_segments[b, i]) & (mask.key_segments[b] != 0)
        seen &= (distance >= 0) if mask.causal else True
        seen &= (distance < mask.window) if mask.window is not None else True
        if seen.any():
            scores = k[b, seen, h // group] @ q[b, i, h] * mask.scale
            scores = mask.soft_cap * np.tanh(scores / mask.soft_cap) if mask.soft_cap is not None else scores
            weights = np.exp(scores - scores.max())
            out[b, i, h] = weights / weights.sum() @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_equal_brute_force(case):
    args, mask = inputs(**case)
    expected = brute_force(*args, mask)
    for name in ANYWHERE:
        np.testing.assert_allclose(jitted(*args, mask, name), expected, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(compiled(*args, mask), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "all"])
def test_gradients_of_blocked_equal_reference(case):
    args, mask = inputs(**CASES[case])
    weights = np.random.default_rng(1).normal(size=(*args[0].shape[:3], args[2].shape[-1])).astype(np.float32)

    def gradients(kernel, mask):
        loss = lambda *a: jnp.sum(kernel(*a, mask, jax.lax.Precision.HIGHEST) * weights)  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*args)

    expected = gradients(OUTPUTS["reference"], mask)
    assert all(np.abs(g).max() > 0.01 for g in expected)
    for one, other in zip(gradients(small_blocks, mask), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradient_of_reference_equals_finite_differences():
    args, mask = inputs(length=6, heads=2, kv_heads=1, window=3, soft_cap=2.0, rows=1, size=4)
    weights = np.random.default_rng(1).normal(size=(*args[0].shape[:3], args[2].shape[-1]))
    gradients = jax.grad(lambda *a: jnp.sum(attend(*a, mask, "reference") * weights), (0, 1, 2))(*args)
    for number, gradient in enumerate(gradients):
        expected = np.zeros(gradient.shape)
        for index in np.ndindex(*gradient.shape):
            shifted = [np.asarray(x, np.float64).copy() for x in args]
            shifted[number][index] += 1e-5
            above = np.sum(brute_force(*shifted, mask) * weights)
            shifted[number][index] -= 2e-5
            expected[index] = (above - np.sum(brute_force(*shifted, mask) * weights)) / 2e-5
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("kernel", [*OUTPUTS.values(), small_blocks], ids=[*OUTPUTS, "small blocks"])
def test_padding_is_finite_and_inert(kernel):
    """Rows that see nothing give zeros and zero gradients, whatever padding holds; nobody sees padding."""
    (q, k, v), mask = inputs(**CASES["window of a block"])
    segments = np.asarray(mask.query_segments).copy()
    segments[1] = 0  # a row of nothing but padding
    mask = dataclasses.replace(mask, query_segments=segments, key_segments=segments)
    padding = segments == 0

    @jax.jit
    def run(*args):
        out, pull = jax.vjp(lambda *a: kernel(*a, mask, jax.lax.Precision.HIGHEST), *args)
        return out, pull(2 * out)

    out, gradients = run(q, k, v)
    assert (np.asarray(out)[padding] == 0).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all() and (np.asarray(gradient)[padding] == 0).all()
    changed = tuple(np.where(padding[..., None, None], 1e4, x).astype(np.float32) for x in (q, k, v))
    np.testing.assert_array_equal(run(*changed)[0], out)


@pytest.mark.parametrize("kernel", ANYWHERE)
def test_sinks_are_a_key_without_a_value(kernel):
    """A sink is as if every query saw one more key, whose score is the head's and whose value is 0."""
    args, mask = inputs(**CASES["window of a block"])
    sinks = np.array([0.7, -1.5], np.float32)
    weights = np.random.default_rng(1).normal(size=(*args[0].shape[:3], args[2].shape[-1])).astype(np.float32)

    def with_a_further_key(q, k, v, sinks):
        scores = jnp.einsum("bqhc,bshc->bhqs", q, jnp.repeat(k, 2, axis=2), precision="highest") * mask.scale
        scores = jnp.where(mask.visible()[:, None], scores, -jnp.inf)
        sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
        return jnp.einsum("bhqs,bshc->bqhc", shares, jnp.repeat(v, 2, axis=2), precision="highest")

    ours = lambda q, k, v, sinks: attend(q, k, v, mask, kernel, sinks=sinks)  # noqa: E731
    found, expected = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(f(*a) * weights), (0, 1, 2, 3)))(*args, sinks)
        for f in (ours, with_a_further_key)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(True, None), (True, 12), (False, None)]),
    st.integers(0, 10**6),
)
def test_any_documents_and_positions(causal_window, seed):
    """Blocked equals brute force for arbitrary segments and positions, also where nothing is aligned."""
    rng = np.random.default_rng(seed)
    queries, keys, (causal, window) = 23, 40, causal_window
    q = rng.normal(size=(1, queries, 2, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, keys, 1, 4)).astype(np.float32)
    positions = lambda n: rng.integers(0, 60, (1, n)).astype(np.int32)  # noqa: E731
    segments = lambda n: np.sort(rng.integers(0, 4, (1, n))).astype(np.int32)  # noqa: E731
    mask = MaskSpec(
        positions(queries), positions(keys), segments(queries), segments(keys), causal, window, 0.5, None, 0
    )
    np.testing.assert_allclose(compiled(q, k, v, mask), brute_force(q, k, v, mask), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([None, 12]), st.sampled_from(["any", "sorted", "packed"]), st.integers(0, 10**6))
def test_any_documents_and_positions_of_tokens_that_see_each_other(window, kind, seed):
    """As from `Decoder.hidden`: what is skipped by index must not depend on what the caller's positions are."""
    rng = np.random.default_rng(seed)
    rows, length = 2, 75
    q, k, v = rng.normal(size=(3, rows, length, 2, 4)).astype(np.float32)
    positions, segments = rng.integers(0, 60, (rows, length)), rng.integers(0, 4, (rows, length))
    if kind == "sorted":
        segments = np.sort(segments)
    if kind == "packed":
        _, positions, segments = packed_rows(rng, rows, length)
        positions[1] = positions[1, ::-1]  # one row as from the packer, one with positions that fall
    positions, segments = positions.astype(np.int32), segments.astype(np.int32)
    mask = MaskSpec(positions, positions, segments, segments, True, window, 0.5, None, 1)
    np.testing.assert_allclose(compiled(q, k, v, mask), brute_force(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_blocks_in_which_nothing_is_seen_are_skipped(window):
    """The loop over key blocks is exactly as long as causality, window and documents demand."""
    length, block = 160, 16
    segments = np.repeat([1, 2, 3, 0], [50, 30, 64, 16])[None].astype(np.int32)
    positions = np.asarray(segment_positions(segments))
    mask = MaskSpec(positions, positions, segments, segments, True, window, 1.0, None, 1)
    side = _Side(_blocks(positions, block), _blocks(segments, block))
    static = _Static(True, window, 1.0, None, jax.lax.Precision.HIGHEST)
    first, end = _key_blocks(static, side, side, _edges(mask.query_indices(), block))
    seen = np.asarray(mask.visible())[0].reshape(length // block, block, length // block, block).any(axis=(1, 3))
    for i, row in enumerate(seen):
        expected = (np.flatnonzero(row)[0], np.flatnonzero(row)[-1] + 1) if row.any() else (0, 0)
        assert (first[i], end[i]) == expected, i


def test_memory_of_blocked_is_linear_in_length():
    length, heads = 8192, 2
    x = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
    i = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = MaskSpec(i, i, i, i, True, None, 1.0, None, 1)
    gradient = jax.jit(jax.grad(lambda q, k, v, m: attend(q, k, v, m, "blocked").sum(), (0, 1, 2)))
    temporary = gradient.lower(x, x, x, mask).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * heads * length**2 / 50, "a matrix of scores is held"


def test_blocked_on_a_mesh():
    """Rows over data, heads over tensor: values and gradients as on one device."""
    mesh = make_mesh(2, 1, 2, jax.devices()[:4])
    args, mask = inputs(length=40, heads=4, kv_heads=2, window=11, soft_cap=2.0)
    run = lambda *a: jnp.sum(jnp.sin(small_blocks(*a, mask, jax.lax.Precision.HIGHEST)))  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(run, (0, 1, 2)))
    expected = gradient(*args)
    sharding = NamedSharding(mesh, P("data", None, "tensor"))
    found = gradient(*jax.device_put(args, sharding))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_bfloat16_keeps_scores_in_float32():
    args, mask = inputs(**CASES["all"])
    low = tuple(jnp.asarray(x, jnp.bfloat16) for x in args)
    expected = brute_force(*(np.asarray(x, np.float32) for x in low), mask)
    for kernel in OUTPUTS.values():
        out = jax.jit(kernel, static_argnums=4)(*low, mask, jax.lax.Precision.DEFAULT)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(np.float32), expected, atol=2e-2)


def test_unknown_kernel_is_refused():
    args, mask = inputs(**CASES["plain"])
    with pytest.raises(UserError, match="model.attention: unknown kernel 'blokced'; did you mean 'blocked'"):
        attend(*args, mask, "blokced")


def chosen(kernel="auto", platform="cpu", length=4096, dtype=jnp.bfloat16, keys=None, sinks=None, **changes):
    """What `kernel` stands for in rows of documents, or with `keys` where a cache is read."""
    arrays = [jax.ShapeDtypeStruct((1, n, 2, 64), dtype) for n in (length, keys or length, keys or length)]
    mask = MaskSpec(None, None, None, None, True, None, 1.0, None, 0 if keys else 1)
    return choose_kernel(kernel, platform, *arrays, dataclasses.replace(mask, **changes), jax.lax.Precision.HIGHEST, sinks)


def test_auto_takes_what_is_best_and_can_compute_the_layer():
    assert chosen(length=1, keys=8192) == chosen(length=64) == chosen(platform="tpu", length=64) == "reference"
    assert chosen() == chosen(platform="tpu", dtype=jnp.float32) == chosen(platform="tpu", length=200) == "blocked"
    assert chosen(platform="tpu") == chosen(platform="tpu", window=7, soft_cap=5.0, sinks=1, parts=4) == "splash"
    assert chosen(platform="tpu", length=256, parts=4) == "blocked"  # 64 tokens on each device
    assert chosen(platform="gpu") == "blocked" and chosen("flash", platform="gpu") == "flash"  # which has not run on one yet
    assert chosen("splash", "tpu", length=256, keys=512) == "blocked"  # a cache is read by what can


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kernel="splash"), "'splash' runs on tpu only, and these devices are cpu; use auto"),
        (dict(kernel="splash", platform="tpu", dtype=jnp.float32), "set model.compute_dtype=bfloat16"),
        (dict(kernel="splash", platform="tpu", length=1024, parts=16), "a multiple of 128 tokens on each of the 16 devices along"),
        (dict(kernel="flash", platform="gpu", window=8), "computes plain causal attention only"),
        (dict(kernel="flash", platform="gpu", parts=2), "takes whole rows; set mesh.context=1"),
    ],
)
def test_a_kernel_that_cannot_compute_the_layer_is_refused(arguments, message):
    with pytest.raises(UserError, match=f"model.attention: {'.*'}{message}"):
        chosen(**arguments)
