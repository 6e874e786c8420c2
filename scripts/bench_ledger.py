"""Measures what the ledger costs a training step: the same step with and without it, taking turns in one process.

    python scripts/bench_ledger.py --model models/nano --data data/quickstart/train.jsonl --length 256 --batch 8

Prints one JSON line: seconds of a step, medians of all turns, and their ratio; the same of CPU seconds, all threads together, which say more
on a machine that does other things; the CPU seconds of the sums over examples as a program of their own, as a share of those of the step,
which is below what two steps can be told apart by; and the host's own seconds for the ledger, which it takes while the device computes
the next steps.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from sft_jax.batch import Batch
from sft_jax.config import default_config
from sft_jax.config_parsing import parse_config
from sft_jax.data.packing.pipeline import batches
from sft_jax.data.prepare import prepare
from sft_jax.hf.load import load_decoder
from sft_jax.hf.restore import model_source
from sft_jax.model.loss import segment_sums
from sft_jax.model.sharding import make_mesh
from sft_jax.training.composition import compose
from sft_jax.training.ledger import Ledger
from sft_jax.training.placement import place_local
from sft_jax.training.resolved import data_model
from sft_jax.training.state import create_state
from sft_jax.training.step import make_train_step
from sft_jax.training.workdir import Workdir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--init", default="checkpoint", choices=["checkpoint", "random"])
    parser.add_argument("--data", required=True, help="JSONL")
    parser.add_argument("--column", action="append", default=[], help="NAME=FIELD, of data.columns")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--segments", type=int, default=64, help="data.max_segments: the sums of a row have so many places")
    parser.add_argument("--turns", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, Path(folder))))


def measure(arguments, folder: Path) -> dict:
    raw = default_config()
    raw.model.path, raw.model.init, raw.model.compute_dtype, raw.model.remat = arguments.model, arguments.init, "float32", "none"
    raw.data.train, raw.data.overlength, raw.data.cache_dir = arguments.data, "drop", str(folder / "cache")
    raw.data.max_length, raw.data.max_segments, raw.train.batch_size = arguments.length, arguments.segments, arguments.batch
    for column in arguments.column:
        raw.data.columns[column.partition("=")[0]] = column.partition("=")[2]
    raw.train.steps = arguments.turns + 1
    config, tokenizer, vocab_size = data_model(parse_config(raw), lambda line: None)
    stream = prepare(
        config.data, model_path=tokenizer, vocab_size=vocab_size, rows=raw.train.steps * arguments.batch, log=lambda line: None
    ).train
    mesh = make_mesh(**vars(config.mesh))
    composed = compose(config, model_source(config.model.path), mesh, log=lambda line: None)
    optimizer = composed.optimizer(raw.train.steps)
    decoder = load_decoder(config.model.path, composed.options, mesh, config.model.dtype, init=config.model.init)
    graphdef, state = create_state(decoder, optimizer, mesh)
    to_device = partial(place_local, mesh=mesh, batch_dim=1)
    steps = {kept: make_train_step(graphdef, optimizer, mesh, config.loss, kept) for kept in (True, False)}
    states = {kept: jax.tree.map(lambda x: x.copy(), state) for kept in steps}
    ledger, host = Ledger(Workdir(folder / "run", lock=False), stream, 0, 0), []
    seconds, cpu_seconds = {True: [], False: []}, {True: [], False: []}
    for turn, (position, batch) in enumerate(batches(stream, 0, arguments.batch, arguments.batch)):
        placed: Batch = to_device(batch)
        for kept in (True, False) if turn % 2 else (False, True):
            start, cpu_start = time.perf_counter(), time.process_time()
            states[kept], metrics = steps[kept](states[kept], placed)
            jax.block_until_ready((states[kept], metrics))
            if turn:  # the first one compiles
                seconds[kept].append(time.perf_counter() - start)
                cpu_seconds[kept].append(time.process_time() - cpu_start)
            if kept:
                values = jax.device_get(metrics)
                start = time.perf_counter()
                ledger.add(turn + 1, position, values)
                host.append(time.perf_counter() - start)
    sums = sums_seconds(placed)
    start = time.perf_counter()
    ledger.write()
    written = time.perf_counter() - start
    numbers = {}
    for name, taken in (("seconds", seconds), ("cpu_seconds", cpu_seconds)):
        with_ledger, without = (float(np.median(taken[kept])) for kept in (True, False))
        numbers |= {f"{name}_with": round(with_ledger, 5), f"{name}_without": round(without, 5)}
        numbers[f"{name}_ratio"] = round(with_ledger / without, 4)
    return {
        "model": arguments.model, "rows": [arguments.batch, arguments.length], "segments": arguments.segments,
        "turns": arguments.turns, **numbers, "sums_cpu_share": round(sums / numbers["cpu_seconds_without"], 5),
        "host_seconds_a_step": round(float(np.median(host)), 6), "seconds_of_writing": round(written, 4),
    }  # fmt: skip


def sums_seconds(batch: Batch) -> float:
    """Returns the CPU seconds of the sums that a step makes for the ledger, for a batch [A, B, L]; median of many."""

    @jax.jit
    def sums(values: list[jax.Array], segments: jax.Array) -> list[jax.Array]:
        return [segment_sums(part, segments, batch.examples.shape[-1]) for part in values]

    segments = batch.segments.reshape(-1, batch.segments.shape[-1])
    values = [batch.weights.reshape(segments.shape) * factor for factor in (1.0, 2.0, 3.0)]
    taken = []
    for _ in range(50):
        start = time.process_time()
        jax.block_until_ready(sums(values, segments))
        taken.append(time.process_time() - start)
    return float(np.median(taken))


if __name__ == "__main__":
    main()
