"""Loading takes the memory of the parameters and little more: no second copy of the model on the host."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from slow_values import slow
from tiny_models import CONFIGS, stored_tensors

from sft_jax.hf.files import SINGLE_FILE
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.options import Options

WORKER = Path(__file__).with_name("memory_worker.py")
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "vocab_size": 8192, "head_dim": 128}


def write_zeros(folder: Path, config: dict) -> Path:
    """Writes a model whose weights are a hole in the file: zeros that take no space on the disk."""
    spec = spec_from_config(config)
    decoder = jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0)))
    header, stop = {}, 0
    for tensor in stored_tensors(decoder, config):
        shape = tensor.packing.shape
        start, stop = stop, stop + 4 * math.prod(shape)
        header[tensor.name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / SINGLE_FILE, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + stop)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("devices", [1, *slow(8)])
def test_peak_memory(devices, tmp_path):
    tiny = write_zeros(tmp_path / "tiny", CONFIGS["llama"])
    large = write_zeros(tmp_path / "large", {**CONFIGS["llama"], **LARGE})
    result = subprocess.run(
        [sys.executable, str(WORKER), str(tiny), str(large), str(devices)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    size, growth = map(int, result.stdout.split())
    assert size > 200e6
    # A stack of one projection is 50 MB and an embedding 17 MB; a second copy of the model would be 2.0.
    assert growth < 1.35 * size, f"{growth / size:.2f} times the parameters"
    assert growth > 0.9 * size, "the measurement does not see the parameters"
