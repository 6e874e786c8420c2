"""Measures training as a user meets it: the real command as a process of its own, and rivals beside it in the same run.

    python scripts/bench_train.py --data ../shared/assets/datasets/gsm8k/train.jsonl \
        --tokenizer ../shared/assets/tokenizers/llama2 --peer trl --peer torch

Prints one JSON line per case: real and supervised tokens/s (without the first step, which compiles), seconds from the
start of the process to the end of the first step (cold and warm caches), peak memory of the process, and MFU where
the device's peak is known (on CPU: against the matmul rate measured in the same run); then a line of ratios. On a CPU
the rivals are given the large memory pages that our command asks for by itself. Nothing else should run meanwhile.

    python scripts/bench_train.py ... --sweep length --sweep batch --sweep layers --sweep accumulation --sweep devices

measures ours alone, with one of these at a time in place of --length, --batch and so on. On a CPU `devices` are those that XLA
makes of one, which shows what dividing costs and not what it gains; on GPUs they are the first ones, as CUDA_VISIBLE_DEVICES says;
TPUs have no such variable, so leave it out there.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

MODELS = {
    "llama24m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 288,
        "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
        "head_dim": 48, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "torch_dtype": "float32",
    },
}  # fmt: skip


class Shape(NamedTuple):
    """What is trained at once."""

    length: int
    batch: int
    micro: int  # rows at a time
    layers: int
    devices: int  # 0: all there are

    @property
    def settings(self) -> list[str]:
        segments = max(64, self.length // 64)  # documents in a row: enough that long rows are full
        return [
            f"--config.data.max_length={self.length}", f"--config.data.max_segments={segments}",
            f"--config.train.batch_size={self.batch}", f"--config.train.micro_batch_size={self.micro}",
        ]  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """Variables that leave a process so many devices, whatever kind they are."""
        if not self.devices:
            return {}
        host = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={self.devices}".strip()
        return {"XLA_FLAGS": host, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(self.devices)))}


def shapes(arguments) -> Iterator[Shape]:
    """Yields the shapes of the sweeps that were asked for. Of long rows there are as many as fill the usual number of tokens."""
    layers = MODELS[arguments.model]["num_hidden_layers"]
    usual = Shape(arguments.length, arguments.batch, arguments.batch, layers, 0)
    for sweep in dict.fromkeys(arguments.sweep):
        if sweep == "length":
            for length in (512, 2048, 8192, 32768):
                rows = max(1, usual.batch * usual.length // length)
                yield usual._replace(length=length, batch=rows, micro=rows)
        elif sweep == "batch":
            yield from (usual._replace(batch=rows, micro=rows) for rows in (1, usual.batch, 4 * usual.batch))
        elif sweep == "layers":
            yield from (usual._replace(layers=count) for count in (layers // 2, layers, 2 * layers))
        elif sweep == "accumulation":
            yield from (usual._replace(batch=8, micro=rows) for rows in (8, 4, 2, 1))
        else:
            yield from (usual._replace(batch=8, micro=8, devices=count) for count in (1, 2, 4, 8))


SWEEPS = ("length", "batch", "layers", "accumulation", "devices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama24m", choices=sorted(MODELS))
    parser.add_argument("--data", required=True, help="JSONL with the fields question and answer")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer directory")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1, help="times that every case is run, in turn; medians are compared")
    parser.add_argument("--peer", action="append", default=[], choices=["trl", "torch"])
    parser.add_argument("--sweep", action="append", default=[], choices=SWEEPS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        matmul = matmul_rate()
        if arguments.sweep:
            return sweep(arguments, work, matmul)
        model = make_model_folder(work / "model", arguments)
        rates: dict[str, list[dict]] = {}
        for round_number in range(arguments.rounds):
            for name, command, environment in cases(arguments, model, work, round_number):
                result = run_case(name, command, environment, arguments, matmul)
                print(json.dumps(result), flush=True)
                rates.setdefault(name, []).append(result)
        print(json.dumps(ratios(rates)), flush=True)


def sweep(arguments, work: Path, matmul: float) -> None:
    """Prints a line for each shape, once its data are prepared and its step is compiled."""
    for number, shape in enumerate(shapes(arguments)):
        model = make_model_folder(work / f"model{number}", arguments, num_hidden_layers=shape.layers)
        caches = {"XDG_CACHE_HOME": str(work / "cache")}
        for steps, shown in ((2, False), (arguments.steps, True)):
            workdir = work / f"run{number}-{steps}"
            command = [*ours(arguments, model), *shape.settings, f"--config.train.steps={steps}", f"--config.log.every={steps}", f"--workdir={workdir}"]
            for _ in range(arguments.rounds if shown else 1):
                result = run_case("sft_jax", command, {**caches, **shape.environment}, arguments, matmul)
                shutil.rmtree(workdir)
                if shown:
                    print(json.dumps({**result, **shape._asdict(), "rows": [shape.batch, shape.length]}), flush=True)


def make_model_folder(folder: Path, arguments, **changed) -> Path:
    """A Hugging Face directory without weights: every case draws its own from the same distribution."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**MODELS[arguments.model], "max_position_embeddings": 32768, **changed}))
    for file in Path(arguments.tokenizer).iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder)
            os.chmod(folder / file.name, 0o644)
    return folder


def ours(arguments, model: Path) -> list[str]:
    """Returns our command, without what is trained at once and the folder of the run."""
    return [
        sys.executable, "-m", "sft_jax.train", f"--config={ROOT / 'configs/sft.py'}",
        f"--config.model.path={model}", "--config.model.init=random", "--config.model.compute_dtype=float32",
        "--config.model.remat=none", f"--config.data.train={arguments.data}", "--config.data.columns.prompt=question",
        "--config.data.columns.completion=answer", "--config.data.chat_template=none",
        "--config.data.overlength=drop", "--config.train.export=False", "--config.checkpoint.every=0",
        "--config.checkpoint.save_last=False", "--config.log.tensorboard=False",
    ]  # fmt: skip


def cases(arguments, model: Path, work: Path, round_number: int):
    """Yields (name, command, environment) of each case; the first two share caches, so the second is warm."""
    rows = Shape(arguments.length, arguments.batch, arguments.batch, 0, 0)
    command = [*ours(arguments, model), *rows.settings, f"--config.train.steps={arguments.steps}", f"--config.log.every={arguments.steps}"]
    caches = {"XDG_CACHE_HOME": str(work / f"cache{round_number}")}
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    for state in ("cold", "warm"):
        yield f"sft_jax {state}", [*command, f"--workdir={work / f'{state}{round_number}'}"], caches
    for peer in dict.fromkeys(arguments.peer):
        script = [sys.executable, str(ROOT / f"scripts/peers/{peer}_sft.py"), str(model), arguments.data]
        yield peer, [*script, str(arguments.length), str(arguments.batch), str(arguments.steps)], caches | pages


def run_case(name: str, command: list[str], environment: dict[str, str], arguments, matmul: float) -> dict:
    """Runs one case as a process; returns its record. A case that fails ends the benchmark with its output."""
    text, seconds, usage = run_process(name, command, environment)
    if name.startswith("sft_jax"):
        workdir = next(part.split("=", 1)[1] for part in command if part.startswith("--workdir="))
        summary = json.loads((Path(workdir) / "summary.json").read_text())
        report = {key: summary[key] for key in ("real_tokens_per_second", "supervised_tokens_per_second", "seconds_to_first_step")}
        report["model_flops_per_second"] = summary["model_flops_per_second"]
        report["prepare_seconds"] = summary["seconds"]["data"]
    else:
        report = json.loads(text.strip().splitlines()[-1])
    flops = report.pop("model_flops_per_second", None)
    return {
        "case": name, "model": arguments.model, "data": Path(arguments.data).name, "rows": [arguments.batch, arguments.length],
        "steps": arguments.steps, **report, "mfu_of_matmul_rate": flops and round(flops / matmul, 3),
        "matmul_flops_per_second": round(matmul), "peak_memory_bytes": usage.ru_maxrss * 1024, "process_seconds": round(seconds, 1),
    }  # fmt: skip


def run_process(name: str, command: list[str], environment: dict[str, str]) -> tuple[str, float, resource.struct_rusage]:
    """Runs a command to its end; returns its output, seconds and resources. One that fails ends the benchmark with its output."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.time()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment, "BENCH_START": str(start)}, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.time() - start
        if process.returncode != 0:
            output.seek(0)
            sys.exit(f"{name} failed:\n{output.read()[-4000:]}")
        output.seek(0)
        return output.read(), seconds, usage


def ratios(results: dict[str, list[dict]]) -> dict:
    """Our warm rate over each rival's, medians over rounds; and the same for memory (below 1 is less)."""

    def median(case: str, key: str) -> float:
        return statistics.median(result[key] for result in results[case])

    line: dict = {"case": "ratios"}
    line["seconds_to_first_step warm / cold"] = round(median("sft_jax warm", "seconds_to_first_step") / median("sft_jax cold", "seconds_to_first_step"), 3)
    for peer in (name for name in results if not name.startswith("sft_jax")):
        for key in ("real_tokens_per_second", "peak_memory_bytes"):
            line[f"{key} / {peer}"] = round(median("sft_jax warm", key) / median(peer, key), 3)
    return line


MATMUL = """
import time, jax
a = jax.numpy.ones((2048, 2048))
multiply = jax.jit(lambda a: jax.numpy.dot(a, a, precision="highest"))
multiply(a).block_until_ready()
seconds = []
for _ in range(9):
    start = time.perf_counter()
    multiply(a).block_until_ready()
    seconds.append(time.perf_counter() - start)
print(2 * 2048**3 / min(seconds))
"""


def matmul_rate() -> float:
    """Returns the FLOP/s of a large fp32 matmul in XLA: the ceiling that MFU on a CPU is measured against."""
    return float(subprocess.run([sys.executable, "-c", MATMUL], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
