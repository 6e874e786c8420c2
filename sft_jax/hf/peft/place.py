"""Putting an adapter of PEFT on its base."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.errors import UserError
from sft_jax.hf.peft.read import Adapter, Values
from sft_jax.hf.peft.settings import WEIGHTS
from sft_jax.model.adapters import AdapterPlan, kernel_values, module_at
from sft_jax.model.attach import attach
from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import is_variable, named_leaves, path_name
from sft_jax.model.vocabulary import stored_shape

Host = Callable[[str], np.ndarray]  # the path of a parameter -> its numbers


def with_adapter(base: Decoder, adapter: Adapter, folder: Path, plan: AdapterPlan | None = None) -> Decoder:
    """Returns `base` with an adapter that was read from `folder`, laid out as the base is.

    `plan` is that of the adapter with other settings of training. Raises UserError where the file repeats parts of the
    base that are not those of `base`.
    """
    _check_unchanged(base, adapter.unchanged, folder)
    decoder = attach(base, plan or adapter.plan, jax.random.key(0))

    def fill(path, leaf):
        name = path_name(path)
        begins_with_zero = name.endswith((".adapter.a", ".adapter.b"))
        if name not in adapter.values and not begins_with_zero:
            return leaf
        array = leaf.get_value()
        host = np.zeros(array.shape, array.dtype) if begins_with_zero else np.array(readable(array))
        for index, part in adapter.values.get(name, ()):
            host[index][tuple(map(slice, part.shape))] = part  # not in rows of a vocabulary that are no tokens
        placed = jax.make_array_from_callback(host.shape, array.sharding, lambda where: host[where])
        return leaf.replace(placed)

    return jax.tree_util.tree_map_with_path(fill, decoder, is_leaf=is_variable)


def readable(array: jax.Array) -> np.ndarray:
    """Returns an array on the host. Of several processes all must call this."""
    if isinstance(array.sharding, NamedSharding) and not array.is_fully_addressable:
        array = _replicate(NamedSharding(array.sharding.mesh, P()))(array)
    return np.asarray(array)


@functools.lru_cache(maxsize=16)
def _replicate(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def host_values(decoder: Decoder) -> Host:
    """Returns a function that gives parameters by path as arrays on the host, as their shape in a checkpoint is.

    Of a quantised kernel it gives the numbers that it stands for.
    """
    leaves, read = dict(named_leaves(decoder)), {}

    def host(path: str) -> np.ndarray:
        if path in read:
            return read[path]
        if path in leaves:
            whole = readable(leaves[path].get_value())
            read[path] = whole[tuple(map(slice, stored_shape(leaves[path], decoder.spec)))]
        else:
            kernel = kernel_values(module_at(decoder, path.removesuffix(".kernel")))
            read[path] = np.asarray(jax.tree.map(readable, kernel).astype(kernel.dtype))
        return read[path]

    return host


def _check_unchanged(base: Decoder, unchanged: Values, folder: Path) -> None:
    host = host_values(base)
    for path, slices in unchanged.items():
        for index, part in slices:
            if not np.array_equal(host(path)[index], jnp.asarray(part, host(path).dtype)):
                raise UserError(
                    f"{folder / WEIGHTS}: holds {path} beside an adapter of it, with other numbers than the base; the adapter was "
                    "trained on a base that had been changed, such as by new tokens. Save that base too, and name it."
                )
