"""Putting adapters on a decoder, and merging them into its kernels.

Both take a decoder and return another one, which shares the arrays that stay. Decoders may be concrete or abstract
(`ShapeDtypeStruct` leaves, with or without shardings); adapters are laid out as their kernels are.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding

from sft_jax.model.adapters import AdapterPlan, adaptable, kernel_of, kernel_values, module_at
from sft_jax.model.decoder import Decoder
from sft_jax.model.layers import Embed
from sft_jax.model.low_rank import LowRank, column_lengths, new_factors, principal_factors
from sft_jax.model.quant import Kernel, QuantisedKernel
from sft_jax.model.sharding import made_like
from sft_jax.model.token_rows import TokenRows


def attach(decoder: Decoder, plan: AdapterPlan, key: jax.Array) -> Decoder:
    """Returns the decoder with new adapters of `plan`; nothing is computed for an abstract one.

    What is drawn for a module depends on `key` and its path only. With the new adapters the decoder computes what it did:
    bit for bit with "lora", PiSSA included, and up to rounding where columns have magnitudes ("dora").
    """
    decoder = _copy(decoder)
    for module in plan.modules:
        node = module_at(decoder, module.path)
        kernel, values = kernel_of(node), kernel_values(node)
        draw = _NewAdapter(
            module.rank, module.scale, module.magnitude, module.start, plan.dropout, values.shape, kernel.axes, kernel.units,
            isinstance(node, Embed),
        )  # fmt: skip
        module_key = jax.random.fold_in(key, zlib.crc32(module.path.encode()))
        node.adapter = made_like(draw, values, module_key, values if module.magnitude or module.start else None)
    if plan.tokens:
        table = decoder.embed.embedding.get_value()
        decoder.embed.token_rows = made_like(_NewRows(plan.tokens, decoder.spec.vocab_rows, 0), table, table)
    if plan.head_tokens:
        head = decoder.lm_head.kernel.get_value()
        decoder.head_rows = made_like(_NewRows(plan.head_tokens, decoder.spec.vocab_rows, 1), head, head)
    decoder.adapters = plan
    return decoder


def merge(decoder: Decoder) -> Decoder:
    """Returns the plain decoder that computes what this one does: adapters are added to kernels, which keep their dtype.

    Up to rounding, which for kernels of 16 bits is that of their dtype. A quantised kernel becomes the numbers that it was
    computed with, in the dtype of the parameter that it stands for: the adapter was trained on those, and not on the
    numbers before quantisation.
    """
    decoder = _copy(decoder)
    for _, node in adaptable(decoder):
        kernel = kernel_of(node)
        if isinstance(kernel, QuantisedKernel):
            node.kernel = made_like(_Merged(kernel.axes, kernel.units), kernel, node.adapter, kernel)
        elif node.adapter is not None:
            _replace_kernel(node, _merged_kernels, node.adapter)
        node.adapter = nnx.data(None)
    if decoder.embed.token_rows is not None:
        _replace_kernel(decoder.embed, _merged_rows, decoder.embed.token_rows)
        decoder.embed.token_rows = nnx.data(None)
    if decoder.head_rows is not None:
        _replace_kernel(decoder.lm_head, _merged_columns, decoder.head_rows)
        decoder.head_rows = nnx.data(None)
    decoder.adapters = None
    return decoder


@dataclass(frozen=True)
class _NewAdapter:
    """How the adapter of one module is made; equal for equal modules, so that they share compiled code."""

    rank: int
    scale: float
    magnitude: bool
    start: bool
    dropout: float
    shape: tuple[int, ...]  # of the kernels [..., in, out]
    axes: tuple[str | None, ...]
    units: FrozenDict
    embed: bool

    def __call__(self, key: jax.Array, kernel: jax.Array | None) -> LowRank:
        start = None
        if self.start:
            factors = start = principal_factors(key, kernel, self.rank, self.scale)
        elif self.embed:  # as PEFT: the row of a token that never occurs stays 0
            a = jnp.zeros((self.shape[0], self.rank), jnp.float32)
            factors = a, jax.random.normal(key, (self.rank, self.shape[1]), jnp.float32)
        else:
            factors = new_factors(key, self.shape, self.rank)
        magnitude = column_lengths(kernel) if self.magnitude else None
        return LowRank(factors, start, magnitude, self.scale, self.dropout, self.axes, self.units)


@dataclass(frozen=True)
class _NewRows:
    """How rows of chosen tokens are made: as copies of those of the table."""

    ids: tuple[int, ...]
    vocab_rows: int
    vocab_axis: int

    def __call__(self, table: jax.Array) -> TokenRows:
        rows = jnp.take(table, jnp.asarray(self.ids), axis=self.vocab_axis)
        return TokenRows((rows.T if self.vocab_axis else rows).astype(jnp.float32), self.ids, self.vocab_rows)


@dataclass(frozen=True)
class _Merged:
    """How the parameter is made that a quantised kernel stands for."""

    axes: tuple[str | None, ...]
    units: FrozenDict

    def __call__(self, adapter: LowRank | None, kernel: QuantisedKernel) -> nnx.Param:
        return nnx.Param(_merged_kernels(adapter, kernel), axes=self.axes, units=self.units)


def _merged_kernels(adapter: LowRank | None, kernel: Kernel) -> jax.Array:
    """Returns the merged kernels, one layer of a stack after the other, since sums are in float32."""

    def merged(inputs):
        adapter, kernel = inputs
        return kernel.astype(kernel.dtype) if adapter is None else adapter.merged(kernel)

    return merged((adapter, kernel)) if len(kernel.shape) == 2 else jax.lax.map(merged, (adapter, kernel))


def _merged_rows(rows: TokenRows, table: jax.Array) -> jax.Array:
    return rows.merged(table)


def _merged_columns(rows: TokenRows, kernel: jax.Array) -> jax.Array:
    return rows.merged(kernel.T).T


def _replace_kernel(node: nnx.Module, merged: Callable, adapter: nnx.Module) -> None:
    """Replaces the kernel of a module by `merged(adapter, kernel)`, in its layout."""
    kernel = kernel_of(node)
    values = kernel.get_value()
    if isinstance(values, jax.ShapeDtypeStruct):
        return
    sharding = values.sharding if isinstance(values.sharding, NamedSharding) else None
    name = "embedding" if isinstance(node, Embed) else "kernel"
    setattr(node, name, kernel.replace(_merger(merged, sharding)(adapter, values)))


@functools.lru_cache(maxsize=256)
def _merger(merged: Callable, sharding: NamedSharding | None) -> Callable:
    return jax.jit(merged, out_shardings=sharding)


def _copy(decoder: Decoder) -> Decoder:
    """Returns a decoder of new modules with the same arrays."""
    return jax.tree.map(lambda leaf: leaf, decoder)
