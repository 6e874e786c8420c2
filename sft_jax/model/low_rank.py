"""What is trained beside a kernel that stays as it is: two small matrices whose product is added to it.

The kernel W [in, out] is computed as if it were W + scale * a @ b, with a [in, r] and b [r, out] (LoRA, Hu et al. 2021,
arXiv:2106.09685). Two refinements:

- PiSSA (Meng et al. 2024, arXiv:2404.02948) begins with the principal part of W instead of with zero. The paper takes
  that part out of W; here W stays, and what a and b began with is subtracted instead: W + scale * (a @ b - a0 @ b0).
- DoRA (Liu et al. 2024, arXiv:2402.09353) sets the length of every column of the sum to `magnitude` [out], which is
  trained; the gradient takes the length that is divided by for a constant (section 4.3).

All of these may have dimensions of layers and experts in front.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from sft_jax.model.quant import Kernel, Product, QuantisedKernel

_SUBSPACE_STEPS = 16  # of the search for the principal part of a kernel
_MORE_COLUMNS = 16  # searched beside those that are kept
# What a side without the hidden size has in place of the kernel's axis: only `tensor` cuts that, and all else would be copies.
_SIDES = dict.fromkeys(("heads", "kv_heads", "mlp"), "side")
_EXPERT_SIDES = dict.fromkeys(("heads", "kv_heads", "mlp"), "expert_side")


class LowRank(nnx.Module):
    """The adapter of one kernel. Parameters are float32, whatever the kernel is."""

    def __init__(
        self,
        factors: tuple[jax.Array, jax.Array],
        start: tuple[jax.Array, jax.Array] | None,
        magnitude: jax.Array | None,
        scale: float,
        dropout: float,
        axes: Sequence[str | None],
        units: Mapping[str, int],
    ):
        """`factors` are a and b, `start` a0 and b0; `axes` and `units` are those of the kernel."""
        side = _EXPERT_SIDES if "expert" in axes else _SIDES
        down, up = (*axes[:-2], side.get(axes[-2], axes[-2]), "rank"), (*axes[:-2], "rank", side.get(axes[-1], axes[-1]))

        def param(value, axes):
            within = FrozenDict({axis: count for axis, count in units.items() if axis in axes})
            return nnx.Param(value, axes=axes, units=within, exact=True, whole_where_uneven="side" in axes or "expert_side" in axes)

        self.a, self.b = param(factors[0], down), param(factors[1], up)
        self.start_a = nnx.data(None) if start is None else param(start[0], down)
        self.start_b = nnx.data(None) if start is None else param(start[1], up)
        lengths = (*axes[:-2], "vocab" if axes[-1] == "vocab" else "norm")
        self.magnitude = nnx.data(None) if magnitude is None else nnx.Param(magnitude, axes=lengths, exact=True)
        self.scale = scale
        self.dropout = dropout

    def __call__(
        self,
        rows: jax.Array,
        y: jax.Array,
        kernel: Kernel,
        key: jax.Array | None,
        dot: Product,
        arrange: Callable[[jax.Array], jax.Array] = lambda kept: kept,
    ) -> jax.Array:
        """Returns what rows [..., in] give with the adapter, where they give y [..., out] with `kernel` alone.

        `dot` is how rows meet a matrix, or the kernel. Dropout falls on what the adapter reads, with `key` only; `arrange`
        brings what is drawn for rows into their order.
        """
        dropped = drop(rows, self.dropout, key, arrange)
        if self.magnitude is None:
            return y + self.added(dropped, dot)
        scale = self.column_scale(kernel).astype(y.dtype)
        if dropped is rows:
            return scale * (y + self.added(rows, dot))
        # As PEFT: dropout reaches the change of the kernel's own share too, which costs a second product.
        return y + (scale - 1) * dot(dropped, kernel, None) + scale * self.added(dropped, dot)

    def products(
        self, rows: jax.Array, kernel: jax.Array, key: jax.Array | None, dot: Product
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Returns (rows [..., n], kernel [n, out]) pairs whose products add up to what `__call__` returns.

        With a magnitude the pairs hold `kernel` with its columns scaled, which is differentiated.
        """
        dropped = drop(rows, self.dropout, key)
        pairs = [(states, b[...]) for states, b in self._pairs(dropped, dot)]
        if self.magnitude is None:
            return [(rows, kernel), *pairs]
        scale = self.column_scale(kernel)
        pairs = [(states, b * scale) for states, b in pairs]
        if dropped is rows:
            return [(rows, (kernel * scale).astype(rows.dtype)), *pairs]
        return [(rows, kernel), (dropped, (kernel * (scale - 1)).astype(rows.dtype)), *pairs]

    def added(self, rows: jax.Array, dot: Product) -> jax.Array:
        """Returns scale * rows @ (a @ b - a0 @ b0), before any magnitude."""
        return functools.reduce(operator.add, (dot(states, b[...], b.axes[-2:]) for states, b in self._pairs(rows, dot)))

    def _pairs(self, rows: jax.Array, dot: Product) -> list[tuple[jax.Array, nnx.Param]]:
        """Returns (states [..., r], matrix [r, out]) pairs whose products add up to `added`."""

        def pair(a: nnx.Param, b: nnx.Param, scale: float) -> tuple[jax.Array, nnx.Param]:
            return dot(rows, a[...], a.axes[-2:]) * scale, b

        pairs = [pair(self.a, self.b, self.scale)]
        return pairs if self.start_a is None else [*pairs, pair(self.start_a, self.start_b, -self.scale)]

    def change(self) -> jax.Array:
        """Returns scale * (a @ b - a0 @ b0) [..., in, out] in float32."""
        return self.scale * _product(self.a, self.b) - self.subtracted()

    def subtracted(self) -> jax.Array | float:
        """Returns scale * a0 @ b0 [..., in, out] in float32, 0 where nothing is subtracted."""
        return 0.0 if self.start_a is None else self.scale * _product(self.start_a, self.start_b)

    def column_scale(self, kernel: Kernel) -> jax.Array:
        """Returns in float32 what the columns of the changed kernel are multiplied by, [..., out]; needs a magnitude."""
        changed = kernel.astype(jnp.float32) + jax.lax.stop_gradient(self.change())
        lengths = jax.lax.stop_gradient(column_lengths(changed))
        return self.magnitude[...] / jnp.where(lengths == 0, 1, lengths)  # no token has a column of zeros, but see vocab_rows

    def merged(self, kernel: Kernel) -> jax.Array:
        """Returns the kernel [..., in, out] that gives alone what `kernel` gives with this adapter, in its dtype."""
        changed = kernel.astype(jnp.float32) + self.change()
        if self.magnitude is not None:
            changed = changed * self.column_scale(kernel)[..., None, :]
        return changed.astype(kernel.dtype)


def _product(a: nnx.Param, b: nnx.Param) -> jax.Array:
    return jnp.matmul(a[...], b[...], precision=jax.lax.Precision.HIGHEST)


def drop(rows: jax.Array, rate: float, key: jax.Array | None, arrange=lambda kept: kept) -> jax.Array:
    """Returns `rows` with entries set to 0 at `rate` and the others scaled up; `rows` itself without a key or a rate."""
    if key is None or not rate:
        return rows
    kept = arrange(jax.random.bernoulli(key, 1 - rate, rows.shape))
    return jnp.where(kept, rows / (1 - rate), 0).astype(rows.dtype)


def split_key(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
    """Returns `count` keys, or as many times None where nothing is random."""
    return (None,) * count if key is None else jax.random.split(key, count)


def column_lengths(kernel: Kernel) -> jax.Array:
    """Returns in float32 the Euclidean length of every column of kernels [..., in, out]."""
    if isinstance(kernel, QuantisedKernel) and len(kernel.shape) > 2:  # one after the other, since they are float32 here
        lengths = jax.lax.map(column_lengths, _without_stack(kernel))
        return lengths.reshape(*kernel.shape[:-2], -1)
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2))


def _without_stack(kernel: Kernel) -> Kernel:
    """Returns kernels [..., in, out] with all dimensions in front as one."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), kernel)


def new_factors(key: jax.Array, shape: Sequence[int], rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns a and b for kernels of `shape` [..., in, out] whose product is zero: a uniform within 1 / sqrt(in), b 0."""
    *stack, size, out = shape
    bound = size**-0.5
    a = jax.random.uniform(key, (*stack, size, rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((*stack, rank, out), jnp.float32)


def principal_factors(key: jax.Array, kernel: Kernel, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Returns a and b with scale * a @ b = the part of kernels [..., in, out] with the `rank` largest singular values.

    Found by subspace iteration from random columns (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4), one kernel after
    the other: a full decomposition of large kernels takes minutes each. Whatever is found is subtracted again, so it need
    not be exact.
    """
    *stack, size, out = kernel.shape
    columns = min(rank + _MORE_COLUMNS, size, out)
    dot = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)  # noqa: E731

    def one(inputs):
        key, w = inputs
        w = w.astype(jnp.float32)
        basis = jnp.linalg.qr(dot(w, jax.random.normal(key, (out, columns), jnp.float32)))[0]

        def refine(_, basis):
            return jnp.linalg.qr(dot(w, jnp.linalg.qr(dot(w.T, basis))[0]))[0]

        basis = jax.lax.fori_loop(0, _SUBSPACE_STEPS, refine, basis)
        left, lengths, right = jnp.linalg.svd(dot(basis.T, w), full_matrices=False)
        roots = jnp.sqrt(lengths[:rank] / scale)
        return dot(basis, left[:, :rank]) * roots, roots[:, None] * right[:rank]

    keys = jax.random.split(key, math.prod(stack))
    a, b = jax.lax.map(one, (keys, _without_stack(kernel)))
    return a.reshape(*stack, size, rank), b.reshape(*stack, rank, out)
