"""The parts of a block that hold parameters: Linear, Embed, Norm, and the gated MLP."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from sft_jax.model.options import Options
from sft_jax.model.spec import DecoderSpec

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def draw(key: jax.Array, shape: tuple[int, ...], deviation: float, dtype) -> jax.Array:
    """Returns new weights: normal with the given standard deviation, cut off at three of them, as float32 draws."""
    return (deviation * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """y = x @ kernel + bias, with a kernel [in, out].

    Every projection of the decoder is one of these, and reads its kernel through `materialise` only.
    """

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
        self.options = options

    def materialise(self) -> jax.Array:
        """Returns the kernel [in, out] in the compute dtype."""
        return self.kernel[...].astype(self.options.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., in] to [..., out] in the compute dtype."""
        # As one matrix: the gradient of the kernel contracts over all rows of it, and over two dimensions at once XLA
        # writes transposed copies of both sides first on the CPU.
        rows = x.reshape(-1, x.shape[-1]).astype(self.options.dtype)
        y = jnp.dot(rows, self.materialise(), precision=self.options.dot_precision).reshape(*x.shape[:-1], -1)
        if self.bias is None:
            return y
        # In float32, because the gradient of the bias is a sum over all rows in the dtype of this addition.
        return (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(y.dtype)


class Embed(nnx.Module):
    """Token embeddings [V, D]; also the head of a model that ties them."""

    def __init__(self, spec: DecoderSpec, key: jax.Array, dtype, options: Options):
        shape = (spec.vocab_size, spec.hidden_size)
        self.embedding = nnx.Param(
            draw(key, shape, spec.initializer_range, dtype), axes=("vocab", "embed"), units=FrozenDict()
        )
        self.scale = spec.embedding_scale
        self.options = options

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the scaled embeddings [..., D] of `tokens` in the compute dtype."""
        # Whole rows of the table, gathered over fsdp as kernels are. Otherwise the lookup makes the hidden size of its
        # result follow the table and the rows follow nothing: every device would hold the states of the whole batch.
        table = self.options.constrain(self.embedding[...], ("vocab", None))
        x = jnp.take(table, tokens, axis=0).astype(self.options.dtype)
        return x * jnp.asarray(self.scale, x.dtype) if self.scale != 1.0 else x


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) over the last axis, in float32."""

    def __init__(self, size: int, spec: DecoderSpec, dtype):
        self.scale = nnx.Param(jnp.full((size,), 1.0 - spec.norm_offset, dtype), axes=("norm",))
        self.offset = spec.norm_offset
        self.epsilon = spec.norm_epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return _rms_norm(x, self.scale[...], self.offset, self.epsilon)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _rms_norm(x: jax.Array, scale: jax.Array, offset: float, epsilon: float) -> jax.Array:
    """Keeps x alone for the backward pass: what is in between is cheaper to compute again than to store."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * (scale.astype(jnp.float32) + offset)).astype(x.dtype)


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, spec: DecoderSpec, key: jax.Array, dtype, options: Options):
        keys = jax.random.split(key, 3)
        wide, narrow = (spec.hidden_size, spec.mlp_size), (spec.mlp_size, spec.hidden_size)
        rest = (spec.initializer_range, dtype, options)
        self.gate = Linear(wide, ("embed", "mlp"), spec.mlp_bias, keys[0], *rest)
        self.up = Linear(wide, ("embed", "mlp"), spec.mlp_bias, keys[1], *rest)
        self.down = Linear(narrow, ("mlp", "embed"), spec.mlp_bias, keys[2], *rest)
        self.activation = spec.activation
        self.options = options

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = _gated(self.gate(x), self.up(x), ACTIVATIONS[self.activation])
        return self.down(self.options.constrain(inner, ("batch", "length", "act_mlp")))


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _gated(gate: jax.Array, up: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns activation(gate) * up; the backward pass keeps the two inputs and no intermediate of the activation."""
    return activation(gate) * up
