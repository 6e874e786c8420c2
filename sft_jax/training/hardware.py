"""Work and memory of a run against what the machine has: FLOPs of a step, peak of the devices, peak memory."""

import collections
import resource
import sys
from collections.abc import Sequence

import jax
import numpy as np

from sft_jax.batch import Batch
from sft_jax.model.spec import LayerSpec

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 4080": 97.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}
# Share of a GPU's memory that a run takes (sft_jax.training.platform) and a plan counts with (sft_jax.planning.machines); the rest is
# for CUDA, cuBLAS and NCCL, which allocate beside JAX.
GPU_MEMORY_FRACTION = 0.92


def peak_flops(device: jax.Device) -> float | None:
    """Returns the bf16 peak of a device in FLOP/s, or None for one that the table does not know (every CPU)."""
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def attention_pairs(batch: Batch, layers: Sequence[LayerSpec]) -> int:
    """Returns the (query, key) pairs that the attention of all layers must look at, summed over layers.

    Within a document, causal and inside the window: a token at position p of its document sees min(p + 1, window).
    """
    seen = batch.positions[batch.segments > 0].astype(np.int64) + 1
    windows = collections.Counter(layer.window for layer in layers)
    return sum(count * int((seen if window is None else np.minimum(seen, window)).sum()) for window, count in windows.items())


def training_flops(trained: int, frozen: int, attention_width: int, tokens: float, pairs: float) -> float:
    """Returns the model FLOPs of training on `tokens` tokens (Kaplan et al. 2020, appendix; PaLM, appendix B).

    Args:
        trained, frozen: Parameters that multiply every token (all kernels and the head, not the embedding lookup), with
            and without a gradient of their own: 6 FLOPs a parameter and token, or 4.
        attention_width: Heads x head size.
        tokens: Real tokens; padding is not work.
        pairs: As `attention_pairs` counts them.
    """
    return (6 * trained + 4 * frozen) * tokens + 12 * attention_width * pairs


def peak_memory() -> dict[str, int]:
    """Returns the peak bytes of this process and, where the platform counts them, of its devices."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if any("peak_bytes_in_use" in entry for entry in stats):
        peak["device"] = max(entry.get("peak_bytes_in_use", 0) for entry in stats)
    return peak
