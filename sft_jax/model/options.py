"""How a decoder is computed: what may change without changing the model."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Constrain = Callable[[jax.Array, Sequence[str | None]], jax.Array]


def no_constraint(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Leaves the layout of an activation to the compiler."""
    del axes
    return x


@dataclass(frozen=True)
class Options:
    """Frozen and hashable, so that it can be static in jit.

    Whatever the options, norms, rope, softmax and logits are computed in float32.
    """

    compute_dtype: str = "float32"  # of matmul operands and of the residual stream
    precision: str = "highest"  # of matmuls with float32 operands: "default", "high" or "highest"
    remat: str = "none"  # what the backward pass recomputes, see sft_jax.model.decoder.REMAT_POLICIES
    attention: str = "auto"  # see sft_jax.model.attention.KERNELS
    neftune: float = 0.0  # strength of the noise on embeddings, in calls with a key (sft_jax.model.neftune)
    qat: str = ""  # what kernels of the blocks are rounded to, see sft_jax.model.qat.ROUNDINGS
    exported_as: str = "float32"  # the dtype whose numbers those are that qat rounds
    constrain: Constrain = no_constraint  # lays out an activation by its logical axes (sft_jax.model.sharding)

    @property
    def mesh(self):
        """The mesh over which activations are laid out, or None."""
        return getattr(self.constrain, "mesh", None)

    @property
    def cuts_rows(self) -> bool:
        """Whether rows of tokens are cut along their length over devices."""
        return self.mesh is not None and self.mesh.shape["context"] > 1

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def dot_precision(self) -> jax.lax.Precision:
        """The precision of a matmul; operands of 16 bits are multiplied exactly in any case."""
        return jax.lax.Precision(self.precision if self.dtype == jnp.float32 else "default")


def unrounded(options: Options) -> Options:
    """Returns the options of a projection that is not rounded with the others of the blocks, such as the head."""
    return dataclasses.replace(options, qat="")
