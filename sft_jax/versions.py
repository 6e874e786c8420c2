"""Which Python and JAX go together, checked without importing either's heavy parts."""

import sys
from importlib import metadata

from sft_jax.errors import UserError

MINIMUM_PYTHON = (3, 11)
MINIMUM_JAX = (0, 10)
JAX_FOR_OLDEST_PYTHON = (0, 10)  # the last release line that supports Python 3.11


def check_versions(python: tuple[int, ...] = sys.version_info[:2], jax: str | None = None) -> None:
    """Raises UserError, one line, for a pair of Python and JAX that is not supported."""
    have = ".".join(map(str, python))
    if python < MINIMUM_PYTHON:
        raise UserError(f"Python {have} is too old: sft_jax needs Python 3.11 or newer.")
    if jax is None:
        try:
            jax = metadata.version("jax")
        except metadata.PackageNotFoundError:
            raise UserError("jax is not installed: pip install sft_jax, with the extra tpu or cuda on such a machine.") from None
    release = tuple(int(part) for part in jax.split(".")[:2])
    if release < MINIMUM_JAX:
        raise UserError(f"jax {jax} is too old: sft_jax needs jax 0.10 or newer (pip install -U jax).")
    if python < (3, 12) and release > JAX_FOR_OLDEST_PYTHON:
        raise UserError(f"jax {jax} does not support Python {have}: use Python 3.12 or newer, or jax 0.10.")
