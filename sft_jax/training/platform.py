"""What must be set before the first array is made: compilation cache, deterministic kernels."""

import os
from pathlib import Path

import jax
from jax._src import xla_bridge  # has no public equivalent of backends_are_initialized

from sft_jax.errors import UserError

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def cache_folder() -> Path:
    """Returns the user's cache folder of this package ($XDG_CACHE_HOME/sft_jax or ~/.cache/sft_jax)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_jax"


def set_up_platform(deterministic: bool) -> None:
    """Turns on the persistent compilation cache, and deterministic GPU kernels where asked.

    A cache folder that the user chose (JAX_COMPILATION_CACHE_DIR or jax.config) is left as it is.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if deterministic and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
            raise UserError(
                "train.deterministic: must be set before JAX has been used in this process; "
                f"start Python with XLA_FLAGS='{_DETERMINISTIC}', or call fit first."
            )
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
