"""The chunked cross-entropy against dense float64, in every corner where fused losses have gone wrong."""

import doctest
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_values import slow

import sft_jax.model.cross_entropy as module
from sft_jax.model.cross_entropy import chunk_rows, cross_entropy
from sft_jax.model.sharding import make_mesh
from sft_jax.training.contracts import dense_cross_entropy, relative_error

ROWS, LENGTH, SIZE, VOCAB = 8, 11, 16, 61  # nothing divides anything

TERMS = ("z_loss", "label_smoothing")
MESHES = {"data8": (8, 1, 1), "fsdp8": (1, 8, 1), "fsdp4_tensor2": (1, 4, 2), "data2_fsdp2_tensor2": (2, 2, 2)}


def problem(seed=0, vocab=VOCAB, share=0.6, spread=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, LENGTH, SIZE)) * spread
    kernel = rng.normal(size=(SIZE, vocab))
    targets = rng.integers(0, vocab, (ROWS, LENGTH)).astype(np.int32)
    weights = rng.uniform(0.1, 3.0, (ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) < share)
    return jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), targets, weights.astype(np.float32)


@partial(jax.jit, static_argnames=("vocab_axis", "vocab_size", "soft_cap", "chunk", "mesh", "z_loss", "label_smoothing"))
def value_and_gradients(hidden, kernel, targets, weights, **options):
    def total(hidden, kernel):
        loss = cross_entropy(hidden, kernel, targets, weights, precision="highest", **options)
        return loss.total, loss

    (_, loss), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, kernel)
    return {"loss": loss.total, "nll": loss.nll, "d hidden": gradients[0], "d head": gradients[1]}, loss.hit


def compare(hidden, kernel, targets, weights, tolerance=1e-5, **options):
    ours, hit = value_and_gradients(hidden, kernel, targets, weights, **options)
    vocab_axis, soft_cap = options.get("vocab_axis", 1), options.get("soft_cap")
    terms = {name: options[name] for name in (*TERMS, "vocab_size") if name in options}
    dense = dense_cross_entropy(hidden, kernel, targets, weights, vocab_axis, soft_cap, **terms)
    for name in dense:
        assert ours[name].shape == dense[name].shape
        assert relative_error(ours[name], dense[name]) <= tolerance, name
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel if vocab_axis else kernel.T, np.float64)
    logits = logits[..., : options.get("vocab_size")]
    np.testing.assert_array_equal(hit, (logits.argmax(-1) == targets) & (weights != 0))
    return ours


def test_the_dense_reference_is_torch_in_float64():
    torch = pytest.importorskip("torch")
    for soft_cap, z_loss, label_smoothing in ((None, 0.0, 0.0), (2.5, 0.0, 0.0), (2.5, 0.3, 0.0), (None, 0.1, 0.2)):
        hidden, kernel, targets, weights = problem()
        h, k = (torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in (hidden, kernel))
        logits = h @ k
        logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
        logits, wanted = logits.reshape(-1, VOCAB), torch.tensor(targets).reshape(-1).long()
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none", label_smoothing=label_smoothing)
        loss = loss + z_loss * torch.logsumexp(logits, dim=-1) ** 2
        total = (loss * torch.tensor(weights).reshape(-1)).sum()
        total.backward()
        dense = dense_cross_entropy(hidden, kernel, targets, weights, 1, soft_cap, z_loss, label_smoothing)
        np.testing.assert_allclose(dense["loss"], total.item(), rtol=1e-12)
        np.testing.assert_allclose(dense["d hidden"], h.grad.numpy(), atol=1e-12)
        np.testing.assert_allclose(dense["d head"], k.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize(
    "chunk, vocab_axis, soft_cap", [(1, 1, None), (7, 0, 2.5), (8, 1, 2.5), (1000, 0, None), (None, 1, None)]
)
def test_equals_dense_float64(chunk, vocab_axis, soft_cap):
    hidden, kernel, targets, weights = problem()
    kernel = kernel if vocab_axis else kernel.T
    compare(hidden, kernel, targets, weights, vocab_axis=vocab_axis, soft_cap=soft_cap, chunk=chunk)


@pytest.mark.parametrize(
    "mesh, vocab_axis, vocab, soft_cap, chunk, z_loss, label_smoothing",
    [
        (None, 1, 61, None, 7, 0.1, 0.0),
        (None, 0, 61, 2.5, 8, 0.0, 0.2),
        (None, 0, 61, 2.5, None, 0.1, 0.2),
        ("fsdp4_tensor2", 1, 64, 2.5, 3, 0.1, 0.2),
        *slow(("data2_fsdp2_tensor2", 0, 61, None, 5, 0.1, 0.2)),
    ],
)
def test_z_loss_and_label_smoothing(mesh, vocab_axis, vocab, soft_cap, chunk, z_loss, label_smoothing):
    """Beside the likelihood, which stays what it is; in a head that is cut over `tensor` and in one that does not divide."""
    hidden, kernel, targets, weights = problem(vocab=vocab, share=np.linspace(0, 1, ROWS)[:, None])
    kernel = kernel if vocab_axis else kernel.T
    options = {"vocab_axis": vocab_axis, "soft_cap": soft_cap, "chunk": chunk, "mesh": mesh and make_mesh(*MESHES[mesh])}
    terms = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    ours = compare(hidden, kernel, targets, weights, **options, **terms)
    loss = cross_entropy(hidden, kernel, targets, weights, precision="highest", **options, **terms)
    assert loss.terms.keys() == {name for name, value in terms.items() if value}
    for name, term in loss.terms.items():
        alone = dense_cross_entropy(hidden, kernel, targets, weights, vocab_axis, soft_cap, **{name: terms[name]})
        total = alone["loss"] - np.sum(weights * alone["nll"])
        np.testing.assert_allclose(np.sum(weights * np.asarray(term, np.float64)), total, rtol=1e-5)
        assert not np.asarray(term)[weights == 0].any()
    assert abs(ours["loss"] - np.sum(weights * ours["nll"])) > 1  # the terms are no rounding error


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_any_share_of_supervised_positions(share):
    hidden, kernel, targets, weights = problem(share=share)
    ours = compare(hidden, kernel, targets, weights, chunk=8)
    if not weights.any():
        assert all(not np.asarray(value).any() for value in ours.values())  # zeros, not NaN


@pytest.mark.parametrize("margin", [5.0, 12.0, 60.0, -12.0, -60.0, -2000.0])
def test_probability_close_to_one_and_to_zero(margin):
    """The target leads all other logits by `margin`: near 1 the gradient is tiny, and as precise as anywhere."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, SIZE, (ROWS, LENGTH)).astype(np.int32)
    kernel = np.eye(SIZE, dtype=np.float32)
    hidden = margin * kernel[targets] + 0.1 * rng.normal(size=(ROWS, LENGTH, SIZE)).astype(np.float32)
    ours = compare(jnp.asarray(hidden), jnp.asarray(kernel), targets, np.ones((ROWS, LENGTH), np.float32), chunk=16)
    if margin == 60.0:
        assert 0 < float(ours["loss"]) < 1e-20


@pytest.mark.parametrize("margin", [None, 12.0])
def test_bfloat16_operands(margin):
    """Logits and sums are fp32, so loss and p are exact for the rounded operands; each gradient matmul then has one
    operand rounded to 8 bits, an error of at most 2^-8 a term that does not grow as p -> 1."""
    hidden, kernel, targets, weights = problem(dtype=jnp.bfloat16)
    if margin is not None:
        targets = targets % SIZE
        hidden = (margin * jnp.eye(SIZE)[targets] + 0.1 * hidden).astype(jnp.bfloat16)
        kernel = jnp.eye(SIZE, dtype=jnp.bfloat16)
    ours, _ = value_and_gradients(hidden, kernel, targets, weights, chunk=16)
    dense = dense_cross_entropy(hidden, kernel, targets, weights, 1, None)
    assert ours["d hidden"].dtype == ours["d head"].dtype == jnp.bfloat16
    assert relative_error(ours["loss"], dense["loss"]) < 1e-5
    for name in ("d hidden", "d head"):
        assert relative_error(ours[name], dense[name]) < 2**-7, name


def test_fp32_kernel_with_bfloat16_hidden_states_keeps_an_fp32_gradient():
    hidden, kernel, targets, weights = problem()
    hidden = hidden.astype(jnp.bfloat16)
    ours, _ = value_and_gradients(hidden, kernel, targets, weights)
    dense = dense_cross_entropy(hidden, kernel.astype(jnp.bfloat16), targets, weights, 1, None)
    assert ours["d head"].dtype == jnp.float32
    assert relative_error(ours["d head"], dense["d head"]) < 2**-8


@pytest.mark.parametrize(
    "mesh, vocab_axis, vocab",
    [
        ("data8", 1, 61),
        ("fsdp8", 0, 61),
        ("fsdp4_tensor2", 0, 61),
        ("fsdp4_tensor2", 1, 64),
        ("data2_fsdp2_tensor2", 0, 64),
        ("data2_fsdp2_tensor2", 1, 61),
    ],
)
def test_on_a_mesh(mesh, vocab_axis, vocab):
    """61 columns do not divide over `tensor`, 64 do. Rows are supervised from not at all to fully, so that devices loop
    a different number of times."""
    hidden, kernel, targets, weights = problem(vocab=vocab, share=np.linspace(0, 1, ROWS)[:, None])
    kernel = kernel if vocab_axis else kernel.T
    mesh = make_mesh(*MESHES[mesh])
    compare(hidden, kernel, targets, weights, vocab_axis=vocab_axis, soft_cap=2.5, chunk=3, mesh=mesh)


@pytest.mark.parametrize(
    "mesh, vocab_axis, soft_cap, terms",
    [
        (None, 1, None, {}),
        (None, 0, 2.5, {"z_loss": 0.1, "label_smoothing": 0.2}),
        ((1, 4, 2), 1, 2.5, {"label_smoothing": 0.2}),
        ((2, 1, 4), 0, None, {"z_loss": 0.1}),
        ((1, 1, 8), 1, None, {"z_loss": 0.1, "label_smoothing": 0.2}),
    ],
)
def test_columns_that_are_no_tokens_take_no_part(mesh, vocab_axis, soft_cap, terms):
    """53 of 64 columns are tokens, the others would have the largest logits; of eight devices one has none of them."""
    hidden, kernel, targets, weights = problem(vocab=64, share=np.linspace(0, 1, ROWS)[:, None])
    kernel, targets = kernel.at[:, 53:].multiply(50), targets % 53
    kernel = kernel if vocab_axis else kernel.T
    mesh = mesh and make_mesh(*mesh)
    options = dict(vocab_axis=vocab_axis, vocab_size=53, soft_cap=soft_cap, chunk=7, mesh=mesh, **terms)
    ours = compare(hidden, kernel, targets, weights, **options)
    gradient = ours["d head"] if vocab_axis else ours["d head"].T
    assert not np.asarray(gradient[:, 53:]).any() and np.asarray(gradient[:, :53]).all()
    outside, _ = value_and_gradients(hidden, kernel, np.full_like(targets, 53), np.ones_like(weights), **options)
    assert np.isnan(outside["nll"]).all()


def test_rows_that_do_not_divide_the_mesh():
    hidden, kernel, targets, weights = problem(vocab=64)
    hidden, targets, weights = hidden[:3], targets[:3], weights[:3]
    compare(hidden, kernel, targets, weights, chunk=5, mesh=make_mesh(1, 4, 2))


@pytest.mark.parametrize("mesh", [None, "fsdp4_tensor2"])
def test_first_index_wins_a_tie(mesh):
    hidden, kernel, targets, _ = problem(vocab=64)
    kernel = jnp.zeros_like(kernel)
    targets = np.where(np.arange(LENGTH) % 3 == 0, 0, np.maximum(targets, 1))
    mesh = mesh and make_mesh(*MESHES[mesh])
    _, hit = value_and_gradients(hidden, kernel, targets, np.ones((ROWS, LENGTH), np.float32), chunk=8, mesh=mesh)
    np.testing.assert_array_equal(hit, targets == 0)


def test_what_is_not_supervised_has_no_influence():
    hidden, kernel, targets, weights = problem()
    clean, _ = value_and_gradients(hidden, kernel, targets, weights, chunk=8)
    spoiled = jnp.where(weights[..., None] == 0, jnp.nan, hidden)
    dirty, _ = value_and_gradients(spoiled, kernel, np.where(weights == 0, -100, targets), weights, chunk=8)
    for name in clean:
        np.testing.assert_array_equal(clean[name], dirty[name])


@pytest.mark.parametrize("mesh", [None, "fsdp4_tensor2"])
@pytest.mark.parametrize("target", [-1, 64])
def test_a_supervised_target_outside_the_vocabulary_is_not_hidden(target, mesh):
    hidden, kernel, targets, weights = problem(vocab=64)
    targets[np.nonzero(weights)[0][0], np.nonzero(weights)[1][0]] = target
    mesh = mesh and make_mesh(*MESHES[mesh])
    ours, _ = value_and_gradients(hidden, kernel, targets, weights, mesh=mesh)
    assert np.isnan(ours["loss"])


def test_not_finite_hidden_states_are_not_hidden():
    hidden, kernel, targets, weights = problem()
    row, column = np.argwhere(weights)[0]
    for bad in (jnp.nan, jnp.inf):
        ours, _ = value_and_gradients(hidden.at[row, column, 0].set(bad), kernel, targets, weights)
        assert not np.isfinite(ours["loss"]) and not np.isfinite(ours["d head"]).all()


def test_the_cotangent_scales_the_gradient():
    hidden, kernel, targets, weights = problem()
    gradient = jax.jit(jax.grad(lambda h, k, scale: scale * cross_entropy(h, k, targets, weights).total, (0, 1)))
    one, three = (gradient(hidden, kernel, scale) for scale in (1.0, -3.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(-3 * a, b, rtol=1e-6), one, three)


def dots(function, *arguments) -> int:
    """The number of matmuls in the jaxpr of `function`, those in loops counted once."""
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general[")


def test_only_what_is_differentiated_is_computed():
    hidden, kernel, targets, weights = problem()
    loss = lambda h, k: cross_entropy(h, k, targets, weights).total  # noqa: E731
    assert dots(loss, hidden, kernel) == 1
    assert dots(jax.grad(loss, 0), hidden, kernel) == 2  # a frozen head costs no gradient of its size
    assert dots(jax.grad(loss, 1), hidden, kernel) == 2
    assert dots(jax.grad(loss, (0, 1)), hidden, kernel) == 3


def test_only_the_total_carries_a_gradient():
    hidden, kernel, targets, weights = problem()
    for what in (lambda loss: loss.nll, lambda loss: sum(loss.terms.values())):
        loss = lambda h, what=what: what(cross_entropy(h, kernel, targets, weights, z_loss=0.1)).sum()  # noqa: E731
        assert not np.asarray(jax.jit(jax.grad(loss))(hidden)).any()


def test_no_full_logits_and_no_recompilation():
    hidden, kernel, targets, _ = problem(vocab=512)
    everything = np.ones((ROWS, LENGTH), np.float32)
    compiled = value_and_gradients.lower(hidden, kernel, targets, everything, chunk=8).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < ROWS * LENGTH * 512 * 4
    before = value_and_gradients._cache_size()
    for share in (0.1, 0.5, 0.9):
        weights = (np.random.default_rng(2).random((ROWS, LENGTH)) < share).astype(np.float32)
        value_and_gradients(hidden, kernel, targets, weights, chunk=9)
    assert value_and_gradients._cache_size() == before + 1


def test_chunk_rows():
    assert doctest.testmod(module).attempted > 0 and doctest.testmod(module).failed == 0
    for positions in (1, 5, 100, 2048, 10_000, 1_000_000):
        for vocab in (8, 32_000, 262_144, 10_000_000):
            rows = chunk_rows(positions, vocab)
            assert 1 <= rows <= min(positions, 1024)
            assert rows * vocab <= 2**27
