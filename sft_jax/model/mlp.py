"""The MLP of a block, gated or plain."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from functools import partial

from sft_jax.model.layers import Linear
from sft_jax.model.low_rank import split_key
from sft_jax.model.options import Options
from sft_jax.model.spec import ClampedGate, MlpSpec

# As transformers names them; "gelu_new" and "gelu_pytorch_tanh" are two writings of one function.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), or down(activation(up(x)))."""

    def __init__(self, spec: MlpSpec, hidden_size: int, key: jax.Array, deviation: float, dtype, options: Options):
        keys = jax.random.split(key, 3)
        wide, narrow = (hidden_size, spec.size), (spec.size, hidden_size)
        rest = (deviation, dtype, options)
        self.gate = Linear(wide, ("embed", "mlp"), spec.bias, keys[0], *rest) if spec.gated else None
        self.up = Linear(wide, ("embed", "mlp"), spec.bias, keys[1], *rest)
        self.down = Linear(narrow, ("mlp", "embed"), spec.bias, keys[2], *rest)
        self.activation = spec.activation
        self.options = options

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps x [B, L, D] to [B, L, D]; `key` is that of the adapters' dropout."""
        gate_key, up_key, down_key = split_key(key, 3)
        if self.gate is None:
            inner = _activated(self.up(x, up_key), self.activation)
        else:
            inner = gated(self.gate(x, gate_key), self.up(x, up_key), self.activation)
        return self.down(self.options.constrain(inner, ("batch", "length", "act_mlp")), down_key)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def gated(gate: jax.Array, up: jax.Array, activation: str | ClampedGate) -> jax.Array:
    """Returns activation(gate) * up; the backward pass keeps the two inputs and no intermediate of the activation."""
    if isinstance(activation, ClampedGate):
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
        return gate * jax.nn.sigmoid(gate * activation.slope) * (up + 1.0)
    return ACTIVATIONS[activation](gate) * up


@partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
def _activated(up: jax.Array, activation: str) -> jax.Array:
    return ACTIVATIONS[activation](up)
