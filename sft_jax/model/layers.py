"""The parts of a block that hold parameters: Linear, ExpertLinear, Embed and Norm."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from sft_jax.model.context import to_zigzag
from sft_jax.model.lookup import look_up
from sft_jax.model.low_rank import LowRank
from sft_jax.model.options import Options
from sft_jax.model.product import product
from sft_jax.model.qat import Unrounded
from sft_jax.model.quant import Kernel, QuantisedKernel, kernel_product
from sft_jax.model.rounding import widened
from sft_jax.model.spec import DecoderSpec, NormSpec
from sft_jax.model.token_rows import TokenRows


def dtype_of(parameter: nnx.Variable, asked):
    """Returns the dtype of a parameter where a model is wanted in the dtype `asked`: float32 for those kept exact.

    Codes and scales of a quantised kernel keep theirs.
    """
    metadata = parameter.get_metadata()
    if "numbers" in metadata:
        return parameter.get_value().dtype
    return jnp.dtype(jnp.float32 if metadata.get("exact") else asked)


def draw(key: jax.Array, shape: tuple[int, ...], deviation: float, dtype) -> jax.Array:
    """Returns new weights: normal with the given standard deviation, cut off at three of them, as float32 draws."""
    return (deviation * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)).astype(dtype)


def resized(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Returns `x` with `size` entries along `axis`: zeros are put behind those that it has, or the last are left out."""
    if x.shape[axis] == size:
        return x
    behind = [(0, size - x.shape[axis] if dimension == axis else 0, 0) for dimension in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), behind)


class Linear(nnx.Module):
    """y = x @ kernel + bias, with a kernel [in, out] and what an adapter adds to it.

    Every projection of the decoder is one of these, and reads its kernel through `operand` only.
    """

    kernel: nnx.Param | QuantisedKernel
    adapter: LowRank | None  # see sft_jax.model.adapters

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        bias: bool,
        key: jax.Array,
        deviation: float,
        dtype,
        options: Options,
        units: dict[str, int] | None = None,
    ):
        """`axes` are logical axes and `units` the pieces into which some may be cut, see sft_jax.model.sharding."""
        units = FrozenDict({axis: count for axis, count in (units or {}).items() if axis in axes})
        self.kernel = nnx.Param(draw(key, shape, deviation, dtype), axes=axes, units=units)
        self.bias = nnx.Param(jnp.zeros(shape[1:], dtype), axes=("norm",)) if bias else None
        self.adapter = nnx.data(None)
        self.options = options

    def operand(self) -> Kernel:
        """Returns the kernel [in, out] as `kernel_product` takes it."""
        return operand(self.kernel, self.options)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps x [..., in] to [..., out] in the compute dtype; `key` is that of the adapter's dropout."""
        # As one matrix: the gradient of the kernel contracts over all rows of it, and over two dimensions at once XLA
        # writes transposed copies of both sides first on the CPU. Not where both dimensions are cut over devices: what such
        # a device holds of the matrix are no neighbouring rows, so it would be gathered.
        rows = (x if self.options.cuts_rows else x.reshape(-1, x.shape[-1])).astype(self.options.dtype)
        plain_dot = partial(product, precision=self.options.dot_precision, constrain=self.options.constrain)
        dot, kernel = partial(kernel_product, plain_dot, constrain=self.options.constrain), self.operand()
        y = dot(rows, kernel, self.kernel.axes[-2:])
        if self.adapter is not None:
            y = self.adapter(rows, y, kernel, key, dot, partial(to_zigzag, mesh=self.options.mesh))
        y = y.reshape(*x.shape[:-1], -1)
        if self.bias is None:
            return y
        return add_bias(y, self.bias[...])


def operand(kernel: nnx.Param | QuantisedKernel, options: Options) -> Kernel:
    """Returns kernels [..., in, out] as they are held, or in another form that `kernel_product` takes."""
    if isinstance(kernel, QuantisedKernel):
        return kernel
    return Unrounded(kernel[...], options.qat, options.exported_as) if options.qat else kernel[...]


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns y + bias in the dtype of y.

    Added in float32, because the gradient of the bias is a sum over all rows in the dtype of this addition.
    """
    return (y.astype(jnp.float32) + widened(bias)).astype(y.dtype)


class ExpertLinear(nnx.Module):
    """The projections of all experts: kernels [E, in, out] and biases [E, out], applied to rows sorted by expert."""

    kernel: nnx.Param | QuantisedKernel
    adapter: LowRank | None  # without magnitude and dropout

    def __init__(
        self,
        count: int,
        shape: tuple[int, int],
        axes: tuple[str, str],
        bias: bool,
        key: jax.Array,
        deviation: float,
        dtype,
        options: Options,
    ):
        self.kernel = nnx.Param(
            draw(key, (count, *shape), deviation, dtype), axes=("expert", *axes), units=FrozenDict()
        )
        self.bias = nnx.Param(jnp.zeros((count, shape[1]), dtype), axes=("expert", "norm")) if bias else None
        self.adapter = nnx.data(None)
        self.options = options

    def operand(self) -> Kernel:
        """Returns the kernels [E, in, out], see `Linear.operand`."""
        return operand(self.kernel, self.options)


class Embed(nnx.Module):
    """Token embeddings [V, D], also the head of a model that ties them; and position embeddings, where they are learned.

    V is `spec.vocab_rows`.
    """

    adapter: LowRank | None  # of the table as a kernel [V, D], without magnitude and dropout
    token_rows: TokenRows | None

    def __init__(self, spec: DecoderSpec, key: jax.Array, dtype, options: Options):
        table = draw(key, (spec.vocab_size, spec.hidden_size), spec.initializer_range, dtype)
        self.embedding = nnx.Param(resized(table, 0, spec.vocab_rows), axes=("vocab", "embed"), units=FrozenDict())
        self.vocab_size = spec.vocab_size
        self.positions = _learned_positions(spec, jax.random.fold_in(key, 1), dtype)
        self.adapter = nnx.data(None)
        self.token_rows = nnx.data(None)
        self.scale = spec.embedding_scale
        self.options = options

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns the embeddings [B, L, D] of `tokens` at `positions` in the compute dtype.

        Where positions are learned, one beyond the table gives NaN.
        """
        if (rows := self.embedding.shape[0]) > self.vocab_size:  # an id that is no token gives NaN, whether there is a row or not
            tokens = jnp.where(tokens < self.vocab_size, tokens, rows)
        x = self._rows(self.embedding, tokens)
        if self.adapter is not None:
            x = x + self._added(tokens)
        if self.token_rows is not None:
            x = self.token_rows.replace_in(x, tokens, self._rows)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.positions is None:
            return x
        return x + self._rows(self.positions, positions)

    def _rows(self, table: nnx.Param, indices: jax.Array) -> jax.Array:
        """Returns rows [B, L, D] of a table [V, D] in the compute dtype; NaN where there is no such row."""
        return look_up(table[...], indices, self.options.dtype, table.axes, self.options.mesh)

    def _added(self, tokens: jax.Array) -> jax.Array:
        """Returns what the adapter adds to the embeddings of `tokens`."""
        states = self._rows(self.adapter.a, tokens) * self.adapter.scale
        b = self.adapter.b
        return product(states, b[...], b.axes, precision=self.options.dot_precision, constrain=self.options.constrain)


def _learned_positions(spec: DecoderSpec, key: jax.Array, dtype) -> nnx.Param | None:
    if spec.learned_positions is None:
        return None
    table = draw(key, (spec.learned_positions, spec.hidden_size), spec.initializer_range, dtype)
    return nnx.Param(table, axes=(None, "embed"), units=FrozenDict())


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, in float32."""

    def __init__(self, size: int, spec: NormSpec, dtype):
        self.scale = nnx.Param(jnp.full((size,), 1.0 - spec.offset, dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((size,), dtype), axes=("norm",)) if spec.bias else None
        self.spec = spec

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalize(x, self.scale[...], None if self.bias is None else self.bias[...], self.spec)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array | None, spec: NormSpec) -> jax.Array:
    """Keeps x alone for the backward pass: what is in between is cheaper to compute again than to store."""
    y = x.astype(jnp.float32)
    if spec.kind == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + spec.epsilon)
    y = y * (widened(scale) + spec.offset)
    return (y if bias is None else y + widened(bias)).astype(x.dtype)
