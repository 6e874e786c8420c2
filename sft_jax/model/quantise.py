"""Storing the kernels of a decoder's blocks in few bits: those of projections and experts.

Embeddings, head, norms, routers, biases and sinks stay as they are: they are small, or what is read of them is.
"""

from dataclasses import dataclass

import jax
from flax import nnx
from flax.core import FrozenDict

from sft_jax.model.adapters import block_projections
from sft_jax.model.decoder import Decoder
from sft_jax.model.quant import QuantisedKernel
from sft_jax.model.sharding import made_like


def quantise(decoder: Decoder, stored_as: str) -> Decoder:
    """Returns the decoder with quantised kernels, laid out as they were; nothing is computed for an abstract one.

    `stored_as` is a key of KERNEL_FORMATS. The arrays that stay are shared.
    """
    decoder = jax.tree.map(lambda leaf: leaf, decoder)
    for _, node in block_projections(decoder):
        kernel: nnx.Param = node.kernel
        values = kernel.get_value()
        node.kernel = made_like(_Quantised(stored_as, kernel.axes, kernel.units), values, values)
    return decoder


@dataclass(frozen=True)
class _Quantised:
    """How the kernel of one module is quantised; equal for equal modules, so that they share compiled code."""

    stored_as: str
    axes: tuple[str | None, ...]
    units: FrozenDict

    def __call__(self, kernel: jax.Array) -> QuantisedKernel:
        return QuantisedKernel(kernel, self.stored_as, self.axes, self.units)
