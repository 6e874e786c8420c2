"""Measures loading a Hugging Face directory: peak memory of the host against the size of the files, and seconds.

    python scripts/bench_load.py --gigabytes 4 [--config DIR/config.json] [--devices 8] [--rounds 3]

A Llama of about that size, or with --config the model that a config.json describes, is written in bfloat16 into a
temporary folder, in shards as published models have. Then ours and transformers' from_pretrained read it in turn, each
in a process of its own, with files in the page cache; a tiny model is read first, so that libraries are not in the
numbers. One JSON line tells for each the medians of the peak of resident memory above what there was before, divided by
the size of the files, and of the seconds.

On a CPU the parameters themselves are in that memory, so 1 is the least that is possible; on a GPU or TPU they are not.
`--devices` are CPU devices, over which parameters are sharded. Nothing else should run on the machine meanwhile.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD = 2_000_000_000  # bytes of a file
TINY = 0.002  # gigabytes


def model_config(gigabytes: float) -> dict:
    """Returns the config.json of a Llama whose parameters take about so many bytes in bfloat16."""
    hidden, vocabulary = (2048, 32000) if gigabytes > 0.1 else (64, 320)
    layer = 12 * hidden * hidden + 2.5 * hidden * hidden
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64, "head_dim": 64,
        "num_key_value_heads": max(1, hidden // 256), "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "dtype": "bfloat16", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "num_hidden_layers": max(1, round((gigabytes * 5e8 - 2 * vocabulary * hidden) / layer)),
    }  # fmt: skip


def write_model(folder: Path, config: dict) -> int:
    """Writes a model of random numbers, a tensor at a time, and returns the bytes of its tensors."""
    import jax
    import ml_dtypes
    import numpy as np

    from sft_jax.hf.match import stored_tensors
    from sft_jax.hf.names import name_table
    from sft_jax.hf.writer import TensorSpec, write_tensors
    from sft_jax.model.decoder import Decoder
    from sft_jax.model.families import spec_from_config
    from sft_jax.model.options import Options

    spec, table = spec_from_config(config), name_table(config)
    decoder = jax.eval_shape(lambda: Decoder(spec, Options(), jax.random.key(0)))
    dtype = np.dtype(ml_dtypes.bfloat16)
    stored = stored_tensors(decoder, table, table.roots[0])
    specs = {tensor.name: TensorSpec(tensor.name, dtype, tensor.packing.shape) for tensor in stored}
    drawn = np.random.default_rng(0).normal(scale=0.02, size=1 << 24).astype(dtype)
    write_tensors(folder, list(specs.values()), lambda name: np.resize(drawn, specs[name].shape), SHARD)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in specs.values())


def read_ours(folder: str):
    import jax

    from sft_jax.hf.load import load_decoder
    from sft_jax.model.options import Options
    from sft_jax.model.sharding import make_mesh

    decoder = load_decoder(folder, Options(), make_mesh(1, -1, 1))
    return jax.block_until_ready(jax.tree.leaves(decoder))


def read_transformers(folder: str):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if torch.cuda.is_available():
        model = model.to("cuda")
    for parameter in model.parameters():  # files that are mapped into memory are read when they are looked at
        parameter.abs().max()
    return model.parameters()


READERS = {"ours": read_ours, "transformers": read_transformers}


def peak() -> int:
    """Returns the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worker(name: str, tiny: str, large: str) -> None:
    import psutil

    READERS[name](tiny)
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    model = READERS[name](large)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak() - before, "parts": len(list(model))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--config", type=Path, default=None, help="of the model that is written instead")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the temporary folder is made; default: the system's")
    parser.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        places, sizes = {}, {}
        given = json.loads(arguments.config.read_text()) if arguments.config else model_config(arguments.gigabytes)
        for name, config in (("tiny", model_config(TINY)), ("large", given)):
            places[name] = Path(folder) / name
            places[name].mkdir()
            sizes[name] = write_model(places[name], config)
        taken: dict[str, list[dict]] = {name: [] for name in READERS}
        for _ in range(arguments.rounds):
            for name in READERS:
                command = [sys.executable, __file__, "--worker", name]
                flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
                result = subprocess.run(
                    [*command, str(places["tiny"]), str(places["large"])], stdout=subprocess.PIPE, text=True, check=True,
                    env={**os.environ, "XLA_FLAGS": flags},
                )  # fmt: skip
                taken[name].append(json.loads(result.stdout.splitlines()[-1]))
    report = {"gigabytes": sizes["large"] / 1e9, "devices": arguments.devices, "rounds": arguments.rounds}
    for name, runs in taken.items():
        report[name] = {
            "seconds": round(statistics.median(run["seconds"] for run in runs), 2),
            "peak_over_files": round(statistics.median(run["peak"] for run in runs) / sizes["large"], 3),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
