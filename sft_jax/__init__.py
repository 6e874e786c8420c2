"""sft_jax: supervised fine-tuning of language models in JAX.

The public names are resolved on first use, so importing the package imports no jax and launch flags can still be set.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "load": "sft_jax.hf.load",
    "save": "sft_jax.hf.save",
    "fit": "sft_jax.training.run",
    "generate": "sft_jax.evaluation.generate",
}

__all__ = ["fit", "generate", "load", "save", "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sft_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
