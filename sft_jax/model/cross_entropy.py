"""Cross-entropy over a vocabulary that makes its gradient in the forward pass and never holds full logits.

Cross-entropy is the last operation of the forward pass, so its gradient with respect to the hidden states and the head
is known as soon as its value is, up to a scalar factor. Computing both at once, chunk by chunk, means that logits
exist for one chunk only and are computed once (Hsu et al., "Liger Kernel", arXiv:2410.10989, section 3.2; Wijmans et
al., "Cut Your Losses", arXiv:2411.09009). Positions without supervision are never computed: supervised positions are
moved to the front, and the loop runs only as often as they need, a number known on the device, so nothing recompiles.

For one position with logits z, target t and weight w, m = max z, e = exp(z - m), r = the sum of e without e_t:

    loss      w * (log(r + e_t) + m - z_t), which is w * log1p(r) where the target is the maximum
    d/dz      w / (r + e_t) * (e, with -r in place of e_t)

Nothing cancels: when p_t -> 1, loss and gradient are as precise, relative to their small selves, as anywhere. The
factor w / (r + e_t) is a row scale, so it is applied to the [C, D] sides of both gradient matmuls, not to the [C, V]
one. Further terms add to both, with log Z = log(r + e_t) + m and the same row scale:

    z-loss c           w * c * (log Z)^2            2 * c * log Z * e
    label smoothing s  w * s * (z_t - mean z)       s * (r + e_t) * ([v = t] - 1 / V)

Letters: B rows, L length, N positions, D hidden size, V vocabulary, C chunk.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from sft_jax.model.sharding import LAYOUT, AnyMesh

MAX_CHUNK_LOGITS = 2**27  # elements: 512 MiB of fp32 logits


class TokenLoss(NamedTuple):
    """What `cross_entropy` returns. Only `total` carries a gradient."""

    total: jax.Array  # fp32 [], sum of weight * (nll + terms)
    nll: jax.Array  # fp32 like targets, negative log-likelihood; 0 where the weight is 0
    hit: jax.Array  # bool like targets, the target is the argmax (first index wins a tie); False where the weight is 0
    terms: dict[str, jax.Array]  # fp32 like targets, what "z_loss" and "label_smoothing" add to nll, where they are on


class _Static(NamedTuple):
    vocab_axis: int
    vocab_size: int
    soft_cap: float | None
    chunk: int | None
    precision: lax.PrecisionLike
    mesh: AnyMesh | None
    z_loss: float
    label_smoothing: float

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(name for name in ("z_loss", "label_smoothing") if getattr(self, name))


def chunk_rows(positions: int, vocab: int) -> int:
    """Returns the positions per chunk for `positions` on this device and `vocab` columns of the head on this device.

    An eighth of all positions as a power of two within 128 and 1024, halved until the logits fit `MAX_CHUNK_LOGITS`.
    Larger chunks read and write the [V, D] gradient less often (from about 1024 on an accelerator computes longer than
    it moves that array); smaller ones waste less of the last, partly filled chunk (here a sixteenth of all on average).

    >>> chunk_rows(2048, 32000), chunk_rows(16384, 128256), chunk_rows(16384, 262144)
    (256, 1024, 512)
    """
    eighth = 2 ** max((positions // 8).bit_length() - 1, 0)
    rows = min(max(eighth, 128), 1024)
    while rows > 8 and rows * vocab > MAX_CHUNK_LOGITS:
        rows //= 2
    return min(rows, positions)


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_axis: int = 1,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    chunk: int | None = None,
    precision: lax.PrecisionLike = None,
    mesh: AnyMesh | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """Returns the weighted sum of -log softmax(soft_cap(hidden @ kernel))[target], and loss and hit per position.

    Args:
      hidden: [B, L, D] in the compute dtype, in which both operands of every matmul are; sums are in fp32.
      kernel: [D, V] (`vocab_axis` 1) or [V, D] (`vocab_axis` 0, a tied embedding as it is stored), any float dtype.
      targets: int [B, L]. A supervised target outside [0, V) gives NaN.
      vocab_size: V, where the kernel has more columns than tokens. Those behind take no part and get no gradient.
      weights: fp32 [B, L], data and not differentiated. Positions of weight 0 cost nothing, and what the hidden state
        holds there (NaN included) has no influence.
      soft_cap: c in z -> c * tanh(z / c) (Gemma 2, arXiv:2408.00118), or None.
      chunk: positions per chunk, by default `chunk_rows`.
      precision: of matmuls with fp32 operands.
      mesh: with the axes data, fsdp and tensor. Each device walks its own rows with its own number of chunks; the
        vocabulary is split over `tensor` where it divides (and computed by each member otherwise), exchanging maxima
        and sums but never logits; the kernel is gathered over fsdp before the loop and its gradient reduced after it.
      z_loss: coefficient of (log Z)^2, which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5).
      label_smoothing: share of the target's probability that is spread evenly over the vocabulary, the target included,
        as by torch's cross_entropy (Szegedy et al., arXiv:1512.00567).

    The gradient is computed in the forward pass, and only if and for what is differentiated: a frozen head costs no
    [V, D] gradient, evaluation costs one matmul. Gradients have the dtypes of `hidden` and `kernel`.
    """
    if mesh is not None and mesh.size == 1:
        mesh = None
    vocab_size = kernel.shape[vocab_axis] if vocab_size is None else vocab_size
    static = _Static(vocab_axis, vocab_size, soft_cap, chunk, precision, mesh, z_loss, label_smoothing)
    total, nll, hit, terms = _cross_entropy(static, hidden, kernel, jnp.asarray(targets), jnp.asarray(weights))
    return TokenLoss(total, lax.stop_gradient(nll), hit, lax.stop_gradient(terms))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, hidden, kernel, targets, weights):
    return _evaluate(static, hidden, kernel, targets, weights, (False, False))[0]


def _forward(static: _Static, hidden, kernel, targets, weights):
    wanted = (hidden.perturbed, kernel.perturbed)
    return _evaluate(static, hidden.value, kernel.value, targets.value, weights.value, wanted)


def _backward(static: _Static, gradients, cotangents):
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        return None, None, None, None
    scaled = [None if g is None else (scale * g.astype(jnp.float32)).astype(g.dtype) for g in gradients]
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _evaluate(static: _Static, hidden, kernel, targets, weights, wanted: tuple[bool, bool]):
    """Returns (total, nll, hit, terms) and (d hidden, d kernel), None for a gradient that is not wanted."""
    operand = kernel.astype(hidden.dtype)
    if static.mesh is None:
        nll, hit, terms, *gradients = _chunk_loop(static, wanted, (), (), hidden, operand, targets, weights)
    else:
        nll, hit, terms, *gradients = _sharded(static, wanted, hidden, operand, targets, weights)
    total = jnp.sum(weights * sum(terms.values(), nll), dtype=jnp.float32)
    d_hidden, d_kernel = gradients
    return (total, nll, hit, terms), (d_hidden, None if d_kernel is None else d_kernel.astype(kernel.dtype))


def _sharded(static: _Static, wanted, hidden, kernel, targets, weights):
    """The same on a mesh. What does not divide its mesh axes is computed by every member of them instead."""
    vocab_axis = static.vocab_axis

    def split(axis: str, size: int) -> tuple[str, ...]:
        return LAYOUT[axis] if size % math.prod(static.mesh.shape[name] for name in LAYOUT[axis]) == 0 else ()

    row_names = split("batch", hidden.shape[0])
    vocab_names = split("vocab", kernel.shape[vocab_axis])
    # d kernel is left split over what it is reduced over, as the parameter is: a reduce-scatter, not an all-reduce.
    scattered = tuple(name for name in split("embed", kernel.shape[1 - vocab_axis]) if name in row_names)
    summed = tuple(name for name in row_names if name not in scattered)

    def local(hidden, kernel, targets, weights):
        nll, hit, terms, d_hidden, d_kernel = _chunk_loop(
            static, wanted, row_names, vocab_names, hidden, kernel, targets, weights
        )
        if d_kernel is not None and scattered:
            d_kernel = lax.psum_scatter(d_kernel, scattered, scatter_dimension=1 - vocab_axis, tiled=True)
        if d_kernel is not None and summed:
            d_kernel = lax.psum(d_kernel, summed)
        return nll, hit, terms, d_hidden, d_kernel

    def kernel_spec(*embed):
        return P(vocab_names, *embed) if vocab_axis == 0 else P(*(embed or (None,)), vocab_names)

    rows = P(row_names)
    gradient_specs = (rows if wanted[0] else None, kernel_spec(scattered) if wanted[1] else None)
    out_specs = (rows, rows, dict.fromkeys(static.terms, rows), *gradient_specs)
    run = jax.shard_map(local, mesh=static.mesh, in_specs=(rows, kernel_spec(), rows, rows), out_specs=out_specs)
    return run(hidden, kernel, targets, weights)


def _chunk_loop(static: _Static, wanted, row_names, vocab_names, hidden, kernel, targets, weights):
    """The loop over chunks of supervised positions on one device, or on one shard of rows and vocabulary.

    Returns nll, hit and terms like `targets`, d hidden like `hidden` and an fp32 d kernel like `kernel` (None if not
    wanted).
    """
    vocab_axis, shape, vocab = static.vocab_axis, targets.shape, kernel.shape[static.vocab_axis]
    hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    positions, size = hidden.shape
    chunk = static.chunk or chunk_rows(positions, vocab)
    padded = -(-positions // chunk) * chunk
    first_column = lax.axis_index(vocab_names) * vocab if vocab_names else 0
    columns = first_column + jnp.arange(vocab, dtype=jnp.int32)
    whole_vocab = static.vocab_size
    is_padded = whole_vocab != (vocab * lax.axis_size(vocab_names) if vocab_names else vocab)
    targets = jnp.where((targets >= 0) & (targets < whole_vocab), targets, -1)

    supervised = weights != 0
    count = jnp.sum(supervised, dtype=jnp.int32)
    order = jnp.argsort(~supervised, stable=True).astype(jnp.int32)  # supervised positions first, in their order
    place = jnp.where(supervised, jnp.cumsum(supervised) - 1, positions - 1)  # its inverse, on supervised positions
    order = jnp.pad(order, (0, padded - positions))
    used = jnp.arange(padded) < count

    dot = partial(lax.dot_general, precision=static.precision, preferred_element_type=jnp.float32)

    def over_vocab(reduce, x):
        return reduce(x, vocab_names) if vocab_names else x

    def tokens_only(x, value):
        """Returns x [C, V] with `value` in the columns that are no tokens."""
        return jnp.where(columns < whole_vocab, x, value) if is_padded else x

    def varying(x, names):
        return lax.pcast(x, names, to="varying") if names else x

    def body(carry):
        start, nll, hit, terms, d_hidden, d_kernel = carry
        index, real = lax.dynamic_slice(order, (start,), (chunk,)), lax.dynamic_slice(used, (start,), (chunk,))
        h = jnp.where(real[:, None], hidden[index], 0)
        target, weight = jnp.where(real, targets[index], 0), jnp.where(real, weights[index], 0)
        z = dot(h, kernel, (((1,), (1 - vocab_axis,)), ((), ())))
        if static.soft_cap is not None:
            z = static.soft_cap * jnp.tanh(z / static.soft_cap)
        z = tokens_only(z, -jnp.inf)
        is_target = columns[None, :] == target[:, None]
        z_max = over_vocab(lax.pmax, jnp.max(z, axis=1))
        e = jnp.exp(z - z_max[:, None])
        earlier_max = (z >= z_max[:, None]) & (columns[None, :] < target[:, None])
        z_target, rest, beaten, z_sum = over_vocab(
            lax.psum,
            (
                _at_target(z, target - first_column),
                jnp.sum(jnp.where(is_target, 0, e), axis=1),
                jnp.any(earlier_max, axis=1).astype(jnp.int32),
                jnp.sum(tokens_only(z, 0), axis=1) if static.label_smoothing else None,
            ),
        )
        z_target = jnp.where(target < 0, jnp.nan, z_target)
        e_sum = rest + jnp.exp(z_target - z_max)
        at_max = z_target >= z_max
        new_nll = jnp.where(at_max, jnp.log1p(rest), jnp.log(e_sum) + (z_max - z_target))
        nll = lax.dynamic_update_slice(nll, new_nll, (start,))
        hit = lax.dynamic_update_slice(hit, at_max & (beaten == 0), (start,))
        log_z = jnp.log(e_sum) + z_max
        new_terms = {}
        if static.z_loss:
            new_terms["z_loss"] = static.z_loss * jnp.square(log_z)
        if static.label_smoothing:
            new_terms["label_smoothing"] = static.label_smoothing * (z_target - z_sum / whole_vocab)
        terms = {name: lax.dynamic_update_slice(terms[name], new, (start,)) for name, new in new_terms.items()}
        if any(wanted):
            d_z = jnp.where(is_target, -rest[:, None], e)  # times weight / e_sum, applied below
            if static.z_loss:
                d_z = d_z + (2 * static.z_loss * log_z)[:, None] * e
            if static.label_smoothing:
                d_z = d_z + (static.label_smoothing * e_sum)[:, None] * (is_target - 1 / whole_vocab)
            if static.soft_cap is not None:
                d_z = d_z * (1 - jnp.square(z / static.soft_cap))
            d_z = tokens_only(d_z, 0).astype(hidden.dtype)
            scale = (weight / e_sum)[:, None]
        if wanted[0]:
            d_h = scale * over_vocab(lax.psum, dot(d_z, kernel, (((1,), (vocab_axis,)), ((), ()))))
            d_hidden = lax.dynamic_update_slice(d_hidden, d_h.astype(hidden.dtype), (start, 0))
        if wanted[1]:
            scaled = (scale * h).astype(hidden.dtype)
            sides = (d_z, scaled) if vocab_axis == 0 else (scaled, d_z)
            d_kernel = d_kernel + dot(*sides, (((0,), (0,)), ((), ())))
        return start + chunk, nll, hit, terms, d_hidden, d_kernel

    init = (
        varying(jnp.int32(0), row_names),
        varying(jnp.zeros(padded, jnp.float32), row_names),
        varying(jnp.zeros(padded, bool), row_names),
        {name: varying(jnp.zeros(padded, jnp.float32), row_names) for name in static.terms},
        varying(jnp.zeros((padded, size), hidden.dtype), row_names) if wanted[0] else None,
        varying(jnp.zeros(kernel.shape, jnp.float32), (*row_names, *vocab_names)) if wanted[1] else None,
    )  # fmt: skip
    _, nll, hit, terms, d_hidden, d_kernel = lax.while_loop(lambda carry: carry[0] < count, body, init)
    nll, hit = jnp.where(supervised, nll[place], 0).reshape(shape), (supervised & hit[place]).reshape(shape)
    terms = {name: jnp.where(supervised, term[place], 0).reshape(shape) for name, term in terms.items()}
    if wanted[0]:
        d_hidden = jnp.where(supervised[:, None], d_hidden[place], 0).reshape(*shape, size)
    return nll, hit, terms, d_hidden, d_kernel


def _at_target(z, column):
    """Returns z[i, column[i]], 0 where the column is not among those of z."""
    inside = (column >= 0) & (column < z.shape[1])
    value = jnp.take_along_axis(z, jnp.clip(column, 0, z.shape[1] - 1)[:, None], axis=1, mode="promise_in_bounds")[:, 0]
    return jnp.where(inside, value, 0)
