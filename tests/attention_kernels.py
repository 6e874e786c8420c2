"""Which attention kernels the tests can run."""

from sft_jax.model.attention import KERNELS

ANYWHERE = [name for name, kernel in KERNELS.items() if kernel.platform is None]
