"""Measures a LoRA run on a base that is stored in few bits beside one on the bfloat16 base: memory, step time, loss.

    python scripts/bench_quant.py --model DIR --data ../shared/assets/datasets/gsm8k/test.jsonl [--steps 6] [--rounds 3]
    python scripts/bench_quant.py --gigabytes 0.6 --tokenizer DIR --data ...    # a drawn Llama of that size, in bfloat16
    python scripts/bench_quant.py --model ../shared/assets/models/stories260k \\
        --records ../shared/assets/reference/stories260k_nll.json    # only the loss, on texts that the model knows

Prints one JSON line for each `adapter.base_dtype` ("" = bfloat16):

    kernel_bytes_per_parameter   of the kernels that are quantised, scales included
    load_peak_over_files         peak of a process that only loads the model, above what it had before, divided by the bytes
                                 of the tensors; on a CPU the parameters are in it, on a GPU or TPU it is that of the device
    seconds_per_step             of the training command, medians over rounds, without the first step, which compiles
    train_peak_bytes             the largest memory of that process

and a line that compares them with bfloat16. The rows of --data have the fields question and answer. Cases are run in turn;
nothing else should run meanwhile. With --records, lists of token ids by text with the losses that an independent float64
computation has given them, a line for each `base_dtype` says how much loss a token quantising adds, in float32 arithmetic.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_load import TINY, model_config, peak, write_model

ROOT = Path(__file__).resolve().parents[1]
BASES = ("", "nf4", "int8", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face directory with weights and tokenizer")
    parser.add_argument("--gigabytes", type=float, help="instead of --model: the size of a Llama that is drawn")
    parser.add_argument("--tokenizer", help="of the model that is drawn: a directory with a tokenizer")
    parser.add_argument("--data", help="JSONL with the fields question and answer")
    parser.add_argument("--records", help="JSON of a list `records` of token ids `ids` with their losses `nll`")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return load_worker(*arguments.worker)
    if bool(arguments.data) == bool(arguments.records):
        parser.error("give --data or --records")
    if bool(arguments.model) == bool(arguments.gigabytes) or bool(arguments.gigabytes) != bool(arguments.tokenizer):
        parser.error("give --model, or --gigabytes with --tokenizer")
    if arguments.records:
        if not arguments.model:
            parser.error("--records are of the texts of a model; give --model")
        return print_losses(arguments.model, json.loads(Path(arguments.records).read_text())["records"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "tiny").mkdir()
        write_model(work / "tiny", model_config(TINY))
        model = Path(arguments.model) if arguments.model else drawn_model(work / "model", arguments)
        rounds: dict[str, list[dict]] = {base: [] for base in BASES}
        for number in range(arguments.rounds):
            for base in BASES:
                loaded = json.loads(run([__file__, "--worker", base, str(work / "tiny"), str(model)]).splitlines()[-1])
                rounds[base].append(loaded | train(base, model, work / f"{base or 'bfloat16'}{number}", arguments))
        results = {base: medians(values) for base, values in rounds.items()}
    for base, result in results.items():
        print(json.dumps({"base_dtype": base or "bfloat16", "model": str(arguments.model or f"{arguments.gigabytes} GB"), **result}))
    print(json.dumps({f"{base} over bfloat16": ratios(results[base], results[""]) for base in BASES if base}))


def print_losses(model: str, records: list[dict]) -> None:
    """Prints what quantising adds to the mean loss of a token."""
    import jax
    import numpy as np

    from sft_jax.hf.load import load_decoder
    from sft_jax.model.options import Options

    recorded = np.concatenate([record["nll"] for record in records])
    for base in BASES:
        decoder, losses = load_decoder(model, Options(), stored_as=base), []
        for record in records:
            ids = np.asarray(record["ids"])
            log_probabilities = np.asarray(jax.nn.log_softmax(decoder(ids[None])))[0]
            losses.append(-log_probabilities[np.arange(len(ids) - 1), ids[1:]])
        mean = float(np.concatenate(losses).mean())
        print(json.dumps({
            "base_dtype": base or "as stored", "model": model, "tokens": len(recorded), "loss": round(mean, 5),
            "added": round(mean - float(recorded.mean()), 5),
        }))  # fmt: skip


def drawn_model(folder: Path, arguments) -> Path:
    """Writes a Llama of random numbers with a tokenizer that its vocabulary has room for."""
    from sft_jax.data.tokenizers.tokens import load_tokenizer

    config = model_config(arguments.gigabytes)
    tokens = load_tokenizer(arguments.tokenizer).vocab_size
    if tokens > config["vocab_size"]:
        sys.exit(f"--tokenizer: has {tokens} tokens, and the model only {config['vocab_size']}.")
    folder.mkdir()
    write_model(folder, config)
    for file in Path(arguments.tokenizer).glob("token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def load_worker(base: str, tiny: str, model: str) -> None:
    """Prints what loading the model alone takes; the tiny one before is for libraries and compilers."""
    import jax
    import psutil

    from sft_jax.hf.load import load_decoder
    from sft_jax.hf.quantised import open_model
    from sft_jax.model.adapters import block_projections, kernel_values
    from sft_jax.model.options import Options

    load_decoder(tiny, Options(), param_dtype="bfloat16", stored_as=base)
    device = jax.devices()[0]
    before = psutil.Process().memory_info().rss
    decoder = load_decoder(model, Options(), param_dtype="bfloat16", stored_as=base)
    top = device.memory_stats()["peak_bytes_in_use"] if device.platform != "cpu" else peak() - before
    kernels = [kernel_values(module) for _, module in block_projections(decoder)]
    size = sum(array.nbytes for array in jax.tree.leaves(kernels))
    count = sum(int(jax.numpy.prod(jax.numpy.array(kernel.shape, float))) for kernel in kernels)
    files = sum(info.nbytes for info in open_model(model).tensors.values())
    print(json.dumps({"kernel_bytes_per_parameter": size / count, "load_peak_over_files": top / files}))


def train(base: str, model: Path, workdir: Path, arguments) -> dict:
    """Runs the training command and returns what its summary says."""
    run([
        "-m", "sft_jax.train", f"--config={ROOT / 'configs/sft.py'}", f"--workdir={workdir}", f"--config.model.path={model}",
        "--config.adapter.name=lora", "--config.optim.learning_rate=1e-3", f"--config.adapter.base_dtype={base}", "--config.model.dtype=bfloat16",
        f"--config.data.train={arguments.data}",
        "--config.data.columns.prompt=question", "--config.data.columns.completion=answer", "--config.data.chat_template=none",
        f"--config.data.max_length={arguments.length}", "--config.data.overlength=drop",
        f"--config.data.cache_dir={workdir.parent / 'data'}", f"--config.train.batch_size={arguments.batch}",
        f"--config.train.steps={arguments.steps}", "--config.train.export=False", "--config.checkpoint.every=0",
        "--config.checkpoint.save_last=False", f"--config.log.every={arguments.steps}", "--config.log.tensorboard=False",
    ])  # fmt: skip
    summary = json.loads((workdir / "summary.json").read_text())
    return {"seconds_per_step": summary["seconds_per_step"], "train_peak_bytes": max(summary["peak_memory_bytes"].values())}


def run(arguments: list[str]) -> str:
    """Runs Python as a process of its own and returns what it printed; a case that fails ends the benchmark."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(arguments[:4])} failed:\n{result.stderr[-4000:]}")
    return result.stdout


def medians(rounds: list[dict]) -> dict:
    return {key: round(statistics.median(values[key] for values in rounds), 5) for key in rounds[0]}


def ratios(result: dict, reference: dict) -> dict:
    keys = ("load_peak_over_files", "seconds_per_step", "train_peak_bytes")
    return {key: round(result[key] / reference[key], 3) for key in keys}


if __name__ == "__main__":
    main()
