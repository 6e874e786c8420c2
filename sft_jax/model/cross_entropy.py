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

import functools
import operator
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from sft_jax.model.rounding import rounded
from sft_jax.model.sharding import AnyMesh, mesh_axes_for

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
    added: Sequence[tuple[jax.Array, jax.Array]] = (),
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
      mesh: as of `make_mesh`. Each device walks its own positions with its own number of chunks; the vocabulary is split
        over `tensor` where it divides (and computed by each member otherwise), exchanging maxima and sums but never
        logits; the kernel is gathered over the other axes before the loop and its gradient reduced after it.
      z_loss: coefficient of (log Z)^2, which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5).
      label_smoothing: share of the target's probability that is spread evenly over the vocabulary, the target included,
        as by torch's cross_entropy (Szegedy et al., arXiv:1512.00567).
      added: further pairs ([B, L, n], [n, V] or [V, n]) whose products are added to hidden @ kernel: adapters of the head,
        which so costs neither a changed copy nor a gradient.

    The gradient is computed in the forward pass, and only if and for what is differentiated: a frozen head costs no
    [V, D] gradient, evaluation costs one matmul. Gradients have the dtypes of `hidden` and `kernel`.
    """
    if mesh is not None and mesh.size == 1:
        mesh = None
    vocab_size = kernel.shape[vocab_axis] if vocab_size is None else vocab_size
    static = _Static(vocab_axis, vocab_size, soft_cap, chunk, precision, mesh, z_loss, label_smoothing)
    states, kernels = zip((hidden, kernel), *added, strict=True)
    total, nll, hit, terms = _cross_entropy(static, states, kernels, jnp.asarray(targets), jnp.asarray(weights))
    return TokenLoss(total, lax.stop_gradient(nll), hit, lax.stop_gradient(terms))


# From here on `states` and `kernels` are tuples: logits are the sum of their products. `wanted` says of each of them
# whether its gradient is.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, states, kernels, targets, weights):
    wanted = ((False,) * len(states), (False,) * len(kernels))
    return _evaluate(static, states, kernels, targets, weights, wanted)[0]


def _forward(static: _Static, states, kernels, targets, weights):
    wanted = tuple(tuple(x.perturbed for x in side) for side in (states, kernels))
    states, kernels = (tuple(x.value for x in side) for side in (states, kernels))
    return _evaluate(static, states, kernels, targets.value, weights.value, wanted)


def _backward(static: _Static, gradients, cotangents):
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        return None, None, None, None
    scaled = jax.tree.map(lambda g: (scale * g.astype(jnp.float32)).astype(g.dtype), gradients)
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _evaluate(static: _Static, states, kernels, targets, weights, wanted):
    """Returns (total, nll, hit, terms) and (d states, d kernels), None for a gradient that is not wanted."""
    operands = tuple(kernel.astype(states[0].dtype) for kernel in kernels)
    if static.mesh is None:
        nll, hit, terms, *gradients = _chunk_loop(static, wanted, (), (), states, operands, targets, weights)
    else:
        nll, hit, terms, *gradients = _sharded(static, wanted, states, operands, targets, weights)
    total = jnp.sum(weights * sum(terms.values(), nll), dtype=jnp.float32)
    d_states, d_kernels = gradients
    d_kernels = tuple(None if g is None else rounded(g, x.dtype) for g, x in zip(d_kernels, kernels, strict=True))
    return (total, nll, hit, terms), (d_states, d_kernels)


def _sharded(static: _Static, wanted, states, kernels, targets, weights):
    """The same on a mesh. What does not divide its mesh axes is computed by every member of them instead."""
    vocab_axis = static.vocab_axis

    split = partial(mesh_axes_for, static.mesh)
    batch_names, length_names = split("batch", targets.shape[0]), split("length", targets.shape[1])
    rows, row_names = P(batch_names, length_names), (*batch_names, *length_names)
    vocab_names = split("vocab", kernels[0].shape[vocab_axis])
    # d kernel is left split over what it is reduced over, as the parameter is: a reduce-scatter, not an all-reduce.
    scattered = [
        tuple(name for name in split("embed", kernel.shape[1 - vocab_axis]) if name in row_names) for kernel in kernels
    ]

    def reduce(d_kernel, scattered):
        if d_kernel is not None and scattered:
            d_kernel = lax.psum_scatter(d_kernel, scattered, scatter_dimension=1 - vocab_axis, tiled=True)
        summed = tuple(name for name in row_names if name not in scattered)
        return d_kernel if d_kernel is None or not summed else lax.psum(d_kernel, summed)

    def local(states, kernels, targets, weights):
        nll, hit, terms, d_states, d_kernels = _chunk_loop(
            static, wanted, row_names, vocab_names, states, kernels, targets, weights
        )
        return nll, hit, terms, d_states, tuple(map(reduce, d_kernels, scattered))

    def kernel_spec(*embed):
        return P(vocab_names, *embed) if vocab_axis == 0 else P(*(embed or (None,)), vocab_names)

    gradient_specs = (
        tuple(rows if wish else None for wish in wanted[0]),
        tuple(kernel_spec(names) if wish else None for wish, names in zip(wanted[1], scattered, strict=True)),
    )
    run = jax.shard_map(
        local, mesh=static.mesh, in_specs=(rows, kernel_spec(), rows, rows),
        out_specs=(rows, rows, dict.fromkeys(static.terms, rows), *gradient_specs),
    )  # fmt: skip
    return run(states, kernels, targets, weights)


def _chunk_loop(static: _Static, wanted, row_names, vocab_names, states, kernels, targets, weights):
    """The loop over chunks of supervised positions on one device, or on one shard of rows and vocabulary.

    Returns nll, hit and terms like `targets`, d states like `states` and fp32 d kernels like `kernels` (None where not
    wanted).
    """
    vocab_axis, shape, vocab = static.vocab_axis, targets.shape, kernels[0].shape[static.vocab_axis]
    states = tuple(x.reshape(-1, x.shape[-1]) for x in states)
    targets, weights, positions, dtype = targets.reshape(-1), weights.reshape(-1), targets.size, states[0].dtype
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
        start, nll, hit, terms, d_states, d_kernels = carry
        index, real = lax.dynamic_slice(order, (start,), (chunk,)), lax.dynamic_slice(used, (start,), (chunk,))
        chunks = [jnp.where(real[:, None], x[index], 0) for x in states]
        target, weight = jnp.where(real, targets[index], 0), jnp.where(real, weights[index], 0)
        z, *more = (dot(h, kernel, (((1,), (1 - vocab_axis,)), ((), ()))) for h, kernel in zip(chunks, kernels, strict=True))
        if more:  # among themselves first: what an adapter adds and subtracts again leaves no trace
            z = z + functools.reduce(operator.add, more)
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
        if any(wanted[0] + wanted[1]):
            d_z = jnp.where(is_target, -rest[:, None], e)  # times weight / e_sum, applied below
            if static.z_loss:
                d_z = d_z + (2 * static.z_loss * log_z)[:, None] * e
            if static.label_smoothing:
                d_z = d_z + (static.label_smoothing * e_sum)[:, None] * (is_target - 1 / whole_vocab)
            if static.soft_cap is not None:
                d_z = d_z * (1 - jnp.square(z / static.soft_cap))
            d_z = tokens_only(d_z, 0).astype(dtype)
            scale = (weight / e_sum)[:, None]

        def with_chunk(d_hidden, kernel):
            d_h = scale * over_vocab(lax.psum, dot(d_z, kernel, (((1,), (vocab_axis,)), ((), ()))))
            return lax.dynamic_update_slice(d_hidden, d_h.astype(dtype), (start, 0))

        def plus_chunk(d_kernel, h):
            scaled = (scale * h).astype(dtype)
            sides = (d_z, scaled) if vocab_axis == 0 else (scaled, d_z)
            return d_kernel + dot(*sides, (((0,), (0,)), ((), ())))

        d_states = tuple(None if d is None else with_chunk(d, x) for d, x in zip(d_states, kernels, strict=True))
        d_kernels = tuple(None if d is None else plus_chunk(d, x) for d, x in zip(d_kernels, chunks, strict=True))
        return start + chunk, nll, hit, terms, d_states, d_kernels

    def zeros(wish, shape, dtype, names):
        return varying(jnp.zeros(shape, dtype), names) if wish else None

    init = (
        varying(jnp.int32(0), row_names),
        varying(jnp.zeros(padded, jnp.float32), row_names),
        varying(jnp.zeros(padded, bool), row_names),
        {name: varying(jnp.zeros(padded, jnp.float32), row_names) for name in static.terms},
        tuple(zeros(wish, (padded, x.shape[1]), dtype, row_names) for wish, x in zip(wanted[0], states, strict=True)),
        tuple(zeros(wish, x.shape, jnp.float32, (*row_names, *vocab_names)) for wish, x in zip(wanted[1], kernels, strict=True)),
    )  # fmt: skip
    with jax.named_scope("cross_entropy"):
        _, nll, hit, terms, d_states, d_kernels = lax.while_loop(lambda carry: carry[0] < count, body, init)
    nll, hit = jnp.where(supervised, nll[place], 0).reshape(shape), (supervised & hit[place]).reshape(shape)
    terms = {name: jnp.where(supervised, term[place], 0).reshape(shape) for name, term in terms.items()}
    d_states = jax.tree.map(lambda d: jnp.where(supervised[:, None], d[place], 0).reshape(*shape, -1), d_states)
    return nll, hit, terms, d_states, d_kernels


def _at_target(z, column):
    """Returns z[i, column[i]], 0 where the column is not among those of z."""
    inside = (column >= 0) & (column < z.shape[1])
    value = jnp.take_along_axis(z, jnp.clip(column, 0, z.shape[1] - 1)[:, None], axis=1, mode="promise_in_bounds")[:, 0]
    return jnp.where(inside, value, 0)
