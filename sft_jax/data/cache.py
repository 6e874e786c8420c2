"""The user's cache folder."""

import os
from pathlib import Path


def default_cache() -> Path:
    """Returns the user's cache folder for prepared data, and for copies of data that lie elsewhere."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sft_jax"
