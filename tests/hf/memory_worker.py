"""Loads a model and prints, in bytes, its size and the growth of peak memory: `memory_worker.py TINY MODEL DEVICES`.

The tiny model is loaded first, so that libraries and the compiler are in memory before the peak is taken.
"""

import sys

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))

from sft_jax.hf.load import load_decoder  # noqa: E402
from sft_jax.model.options import Options  # noqa: E402
from sft_jax.model.sharding import make_mesh  # noqa: E402


def peak() -> int:
    """The largest resident size so far (VmHWM), in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


mesh = make_mesh(1, -1, 1)
load_decoder(sys.argv[1], Options(), mesh)
before = peak()
decoder = load_decoder(sys.argv[2], Options(), mesh)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(decoder)), peak() - before)
assert all(np.isfinite(leaf[..., :1]).all() for leaf in jax.tree.leaves(decoder))
