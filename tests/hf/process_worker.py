"""One of several processes that load, save and export a model together: `process_worker.py MODEL OUT PORT COUNT INDEX`.

Prints one JSON object: bytes read, the sum of every parameter, and how each export ended. "larger" has three more tokens.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

model, out, port, count, index = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 8 // count)
jax.distributed.initialize(f"127.0.0.1:{port}", count, index)

from sft_jax.hf import files, save  # noqa: E402
from sft_jax.hf.export import export_checkpoint  # noqa: E402
from sft_jax.hf.load import load_decoder  # noqa: E402
from sft_jax.model.options import Options  # noqa: E402
from sft_jax.model.sharding import make_mesh, named_leaves  # noqa: E402

read_bytes = 0
original_read = files.TensorDirectory.read


def counted_read(self, *args):
    global read_bytes
    array = original_read(self, *args)
    read_bytes += array.nbytes
    return array


files.TensorDirectory.read = counted_read
decoder = load_decoder(model, Options(), make_mesh(1, 4, 2))
result = {"read": read_bytes, "fingerprint": decoder.source.fingerprint}
result["sums"] = {
    path: float(jnp.sum(jnp.abs(leaf.get_value())).block_until_ready()) for path, leaf in named_leaves(decoder)
}
result["logit_difference"] = export_checkpoint(decoder, None, out / "exported", max_shard_size=30_000).logit_difference
larger = load_decoder(model, Options(), make_mesh(1, 4, 2), vocab_size=99)
result["larger_difference"] = export_checkpoint(larger, None, out / "larger").logit_difference


def failure(path: Path) -> str:
    try:
        save.save(decoder, None, path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


result["taken"] = failure(out / "exported")
try:  # a directory that only the first process can see
    load_decoder(model if index == 0 else out / "absent", Options(), make_mesh(1, 4, 2))
except Exception as error:
    result["absent"] = f"{type(error).__name__}: {error}"
if index == 0:  # the disk of the first process fills up while it writes its second tensor

    def full(array):
        raise OSError(28, "No space left on device")

    original = save.write_tensors
    save.write_tensors = lambda folder, specs, fetch, size: (fetch(specs[0].name), full(None))
result["full"] = failure(out / "full")
if index == 0:
    save.write_tensors = original
result["after"] = failure(out / "after")
print(json.dumps(result))
