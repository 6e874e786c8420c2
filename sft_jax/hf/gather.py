"""The tensors of a decoder in the Hugging Face format, computed one by one, and those that come from its base."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.errors import UserError
from sft_jax.hf.files import TensorDirectory
from sft_jax.hf.match import stored_tensors
from sft_jax.hf.names import name_table
from sft_jax.hf.quantised import open_model
from sft_jax.hf.rules import Packing, Stored
from sft_jax.hf.source import find_model
from sft_jax.hf.writer import TensorSpec
from sft_jax.model.decoder import Decoder
from sft_jax.model.layers import dtype_of
from sft_jax.model.sharding import named_leaves


def carried_tensors(decoder: Decoder) -> TensorDirectory:
    """Returns the tensors of the base that are no parameters of the decoder and that an export takes along.

    They are not in memory, and neither checkpoints nor training touch them, so they are in the base's files alone.
    Raises UserError where the base is gone or damaged.
    """
    source = decoder.source
    table = name_table(source.config_dict())
    if not table.carried:
        return TensorDirectory(Path(), {})
    try:
        base = open_model(find_model(source.name))
    except UserError as error:
        raise UserError(
            f"{source.name}: holds tensors that are not of the language model, such as a vision tower, and an export "
            f"takes them from there: {error}"
        ) from error
    names = table.carried_names(decoder.spec, base.tensors)
    return dataclasses.replace(base, tensors={name: base.tensors[name] for name in names})


class Tensors:
    """The tensors that a decoder has in the Hugging Face format, computed one by one."""

    def __init__(self, decoder: Decoder, dtype: str | None = None):
        self._params = {path: leaf.get_value() for path, leaf in named_leaves(decoder)}
        source = decoder.source
        table = name_table(source.config_dict())
        stored = stored_tensors(decoder, table, table.root_of(source.root))
        self._stored = {tensor.name: tensor for tensor in stored}
        leaves = named_leaves(decoder)
        self._dtypes = {path: dtype_of(leaf, dtype) if dtype else leaf.get_value().dtype for path, leaf in leaves}
        self.specs = [TensorSpec(tensor.name, self._dtype(tensor), tensor.packing.shape) for tensor in stored]
        self.nbytes = sum(spec.nbytes for spec in self.specs)

    def gather(self, name: str) -> jax.Array:
        """Returns one tensor. Of several processes all must call this, in the same order."""
        tensor = self._stored[name]
        parts = tuple(self._params[path] for path in tensor.paths)
        take = _taker(_readable(parts[0].sharding), tensor.packing, self._dtype(tensor))
        return take(parts, np.asarray(tensor.index, np.int32))

    def _dtype(self, tensor: Stored) -> np.dtype:
        return np.dtype(jnp.result_type(*(self._dtypes[path] for path in tensor.paths)))

    @property
    def dtype(self) -> str:
        """The dtype that most bytes have."""
        sizes: dict[str, int] = {}
        for spec in self.specs:
            sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.nbytes
        return max(sizes, key=sizes.get)


@functools.lru_cache(maxsize=256)
def _taker(sharding, packing: Packing, dtype: np.dtype) -> Callable[..., jax.Array]:
    def take(params, index):
        parts = []
        for number, param in enumerate(params):
            start = [*index, *[0] * (param.ndim - len(index))]
            shape = packing.parameter_shape(number)  # without the rows of a vocabulary that are no tokens
            part = jax.lax.dynamic_slice(param, start, (*[1] * len(index), *shape))
            parts.append(part.reshape(shape).astype(dtype))
        return packing.join(parts)

    return jax.jit(take, out_shardings=sharding)


def _readable(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """Returns the sharding in which one process can read an array; None leaves the layout to the compiler."""
    if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
        return NamedSharding(sharding.mesh, P())
    return None
