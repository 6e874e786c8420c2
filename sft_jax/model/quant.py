"""Kernels that are stored in 4 or 8 bits and never trained: codes and scales in place of numbers.

A kernel [..., in, out] is cut into blocks of inputs, each with one scale an output. NF4 (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314) has blocks of 64, as bitsandbytes has, whose codes and scales these are wherever 64 divides `in`. int8 and
float8 (e4m3) have one block, that is a scale an output.

Codes depend on the kernel alone and not on how it is laid out: they are made of maxima, divisions and comparisons.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from sft_jax.model.options import Constrain, no_constraint
from sft_jax.model.product import Gathered
from sft_jax.model.qat import Unrounded
from sft_jax.model.sharding import GATHERED

NF4_BLOCK = 64
# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero: appendix E of the paper.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_INT8_LARGEST = 127.0
_FLOAT8 = jnp.float8_e4m3fn

# (rows [N, in], matrix [in, out] or [E, in, out], logical axes of a parameter) -> [N, out] in the dtype of the rows
Product = Callable[[jax.Array, jax.Array | Gathered, Sequence[str | None] | None], jax.Array]


@dataclass(frozen=True)
class KernelFormat:
    """One way to store kernels [..., in, out]."""

    quantise: Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # float32 kernel -> codes, float32 scales
    dequantise: Callable[[jax.Array, jax.Array], jax.Array]  # the inverse, up to rounding and an input that pads the last byte
    block: int  # inputs that are never cut apart, since they share a scale or a byte
    inputs: int  # that one code holds


class QuantisedKernel(nnx.Module):
    """A kernel [..., in, out] as codes and scales, in the place of the parameter that it stands for.

    It has that parameter's shape, dtype, axes and units, and is a pytree of the two arrays.
    """

    def __init__(self, kernel: jax.Array, stored_as: str, axes: Sequence[str | None], units: Mapping[str, int]):
        """`stored_as` is a key of KERNEL_FORMATS; `axes` and `units` are those of the kernel, see sft_jax.model.sharding."""
        kind = KERNEL_FORMATS[stored_as]
        codes, scales = _by_matrix(lambda kernel: kind.quantise(kernel.astype(jnp.float32)), kernel)
        # What is gathered before it is read may have its codes cut anywhere between their bytes.
        piece = kind.inputs if axes[-2] in GATHERED else kind.block
        layouts = (_cut_units(kernel.shape[-2], axes, units, size) for size in (piece, kind.block))
        # `numbers`: of the kernel, that an element stands for.
        parts = zip((codes, scales), layouts, (kind.inputs, 0), strict=True)
        self.codes, self.scales = (
            nnx.Param(part, axes=tuple(axes), units=cut, numbers=numbers, whole_where_uneven=True) for part, cut, numbers in parts
        )
        self.stored_as = stored_as
        self.dtype = jnp.dtype(kernel.dtype)
        self.axes = tuple(axes)
        self.units = FrozenDict(units)
        self.padded = kind.inputs * codes.shape[-2] > kernel.shape[-2]

    def divides(self, pieces: int) -> bool:
        """Returns whether the inputs can be cut into so many pieces of whole blocks, or of one block that all of them share."""
        kind, size = KERNEL_FORMATS[self.stored_as], self.shape[-2]
        unit = kind.inputs if self.scales[...].shape[-2] == 1 else kind.block
        return size % (pieces * unit) == 0

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, codes, out = self.codes.get_value().shape
        return *stack, KERNEL_FORMATS[self.stored_as].inputs * codes - self.padded, out

    def astype(self, dtype, constrain: Constrain = no_constraint) -> jax.Array:
        """Returns the kernel [..., in, out], computed in float32 and rounded to `dtype` once.

        With `constrain` codes and scales are gathered as they are, so that few bits travel.
        """
        whole = [None if axis in GATHERED else axis for axis in self.axes[-2:]]
        codes, scales = (
            constrain(part[...], [*[None] * (part.ndim - 2), *whole]) for part in (self.codes, self.scales)
        )
        kernel = KERNEL_FORMATS[self.stored_as].dequantise(codes, scales)
        return (kernel[..., :-1, :] if self.padded else kernel).astype(dtype)


def _by_matrix(function: Callable, kernel: jax.Array):
    """Returns `function` of kernels [..., in, out], of one layer after the other, since what it makes is float32."""
    return jax.lax.map(function, kernel) if kernel.ndim > 2 else function(kernel)


Kernel = jax.Array | Gathered | QuantisedKernel | Unrounded


def kernel_product(
    dot: Product, rows: jax.Array, kernel: Kernel, axes: Sequence[str | None] | None = None, constrain: Constrain = no_constraint
) -> jax.Array:
    """Returns dot(rows, kernel), where a kernel of another form is made to numbers; see its `astype`.

    The backward pass makes them once more, so that none live longer than their product. What is rounded for QAT is made in
    float32, since so is its gradient.
    """
    if not isinstance(kernel, QuantisedKernel | Unrounded):
        return dot(rows, kernel, axes)

    def make_and_multiply(rows, kernel):
        dtype = jnp.float32 if isinstance(kernel, Unrounded) else rows.dtype
        return dot(rows, kernel.astype(dtype, constrain), axes)

    return jax.checkpoint(make_and_multiply, prevent_cse=False)(rows, kernel)


def _quantise_nf4(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns codes uint8 [..., ceil(in / 2), out], the first of two inputs in the higher bits, and scales a block.

    The last block is shorter where 64 does not divide `in`. A number half-way between two values gets the lower one.
    """
    *stack, size, out = kernel.shape
    blocks = -(-size // NF4_BLOCK)
    padded = _pad_inputs(kernel, blocks * NF4_BLOCK).reshape(*stack, blocks, NF4_BLOCK, out)
    scales = jnp.max(jnp.abs(padded), axis=-2)
    normal = padded / jnp.where(scales == 0, 1, scales)[..., None, :]
    middles = [(low + high) / 2 for low, high in zip(NF4_VALUES, NF4_VALUES[1:])]
    codes = sum((normal > jnp.float32(middle)).astype(jnp.uint8) for middle in middles)
    pairs = codes.reshape(*stack, blocks * NF4_BLOCK // 2, 2, out)[..., : -(-size // 2), :, :]
    return (pairs[..., 0, :] << 4) | pairs[..., 1, :], scales


def _dequantise_nf4(codes: jax.Array, scales: jax.Array) -> jax.Array:
    *stack, pairs, out = codes.shape
    blocks = scales.shape[-2]
    padded = _pad_inputs(codes, blocks * NF4_BLOCK // 2).reshape(*stack, blocks, NF4_BLOCK // 2, out)
    # The sixteen numbers of each block, of which each code takes one: no gather, which is slow on accelerators, and no
    # arrays of constants, which XLA moves out of the loop over layers and keeps.
    numbers = [(jnp.float32(value) * scales)[..., None, :] for value in NF4_VALUES]
    kernel = jnp.stack([_choose(padded >> 4, numbers), _choose(padded & 15, numbers)], axis=-2)
    return kernel.reshape(*stack, -1, out)[..., : 2 * pairs, :]


def _choose(codes: jax.Array, numbers: Sequence[jax.Array]) -> jax.Array:
    """Returns numbers[code] for every code, chosen bit by bit from the highest on."""
    if len(numbers) == 1:
        return numbers[0]
    half = len(numbers) // 2
    return jnp.where(codes & half, _choose(codes, numbers[half:]), _choose(codes, numbers[:half]))


def _pad_inputs(x: jax.Array, size: int) -> jax.Array:
    """Returns x [..., in, out] with zeros after its inputs, [..., size, out]."""
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, size - x.shape[-2]), (0, 0)])


def _quantise_int8(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns codes int8 like the kernel, within -127 and 127, and scales [..., 1, out]."""
    scales = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) * jnp.float32(1 / _INT8_LARGEST)
    codes = jnp.round(kernel / jnp.where(scales == 0, 1, scales))
    return jnp.clip(codes, -_INT8_LARGEST, _INT8_LARGEST).astype(jnp.int8), scales


def _quantise_float8(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns codes float8_e4m3fn like the kernel, within -448 and 448, and scales [..., 1, out]."""
    largest = float(jnp.finfo(_FLOAT8).max)
    scales = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) * jnp.float32(1 / largest)
    return jnp.clip(kernel / jnp.where(scales == 0, 1, scales), -largest, largest).astype(_FLOAT8), scales


def _dequantise_scaled(codes: jax.Array, scales: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) * scales


def _cut_units(size: int, axes: Sequence[str | None], units: Mapping[str, int], block: int) -> FrozenDict:
    """Returns into how many pieces the axes of codes and scales may be cut, where `units` holds for those of the kernel.

    A piece of the inputs is a whole number of blocks and of the kernel's own units, such as heads.
    """
    own = {axis: count for axis, count in units.items() if axis in axes}
    if block > 1 and axes[-2] is not None:
        piece = math.lcm(block, size // own.get(axes[-2], size))
        own[axes[-2]] = size // piece if size % piece == 0 else 1
    return FrozenDict(own)


# adapter.base_dtype -> how the base is stored.
KERNEL_FORMATS: dict[str, KernelFormat] = {
    "nf4": KernelFormat(_quantise_nf4, _dequantise_nf4, block=NF4_BLOCK, inputs=2),
    "int8": KernelFormat(_quantise_int8, _dequantise_scaled, block=1, inputs=1),
    "fp8": KernelFormat(_quantise_float8, _dequantise_scaled, block=1, inputs=1),
}
