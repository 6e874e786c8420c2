"""Decoders with adapters that do something, as after training."""

import jax
import numpy as np
from tiny_models import dotted, is_variable

from sft_jax.model.adapters import is_adapter, plan_adapters
from sft_jax.model.attach import attach
from sft_jax.model.decoder import Decoder
from sft_jax.model.vocabulary import stored_shape

# One of each kind, on the projections of the blocks.
KINDS = {
    "lora": dict(name="lora", rank=3, alpha=6),
    "rslora": dict(name="lora", rank=4, alpha=5, rslora=True),
    "dora": dict(name="dora", rank=3, alpha=6),
    "pissa": dict(name="lora", rank=3, alpha=6, init="pissa"),
    "pissa_dora": dict(name="dora", rank=3, alpha=6, init="pissa"),
}


def adapted(decoder: Decoder, *, trained: bool = True, seed: int = 0, **settings) -> Decoder:
    """The decoder with adapters; `trained` moves every number that training would."""
    result = attach(decoder, plan_adapters(decoder, **settings), jax.random.key(seed))
    return moved(result) if trained else result


def moved(decoder: Decoder) -> Decoder:
    """Adds noise to what adapters train, and to parameters that are trained beside them; not to rows that are no tokens."""

    def move(path, leaf):
        path = dotted(path)
        moves = path in decoder.adapters.trained or is_adapter(path) and "start_" not in path
        if not moves:
            return leaf
        rng = np.random.default_rng([*path.encode(), *leaf.shape])
        noise = np.zeros(leaf.shape)
        noise[tuple(map(slice, stored_shape(leaf, decoder.spec)))] = rng.normal(size=stored_shape(leaf, decoder.spec), scale=0.1)
        return leaf.replace(leaf[...] + np.asarray(noise, leaf.dtype))

    return jax.tree_util.tree_map_with_path(move, decoder, is_leaf=is_variable)
