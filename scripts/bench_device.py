"""Measures training on one accelerator, each case as a process of its own and TRL beside it in the same run.

    python scripts/bench_device.py --data DATA.jsonl --tokenizers DIR --peer trl

The cases are full fine-tuning of Llama 3.2 1B and LoRA on Qwen3 8B, bfloat16 matmuls, packed rows of 4,096 tokens. The weights are
drawn at random, which changes no figure here. DIR holds the tokenizers `llama3` and `qwen3`. Prints a JSON line for each: real and supervised tokens/s without
the first step, MFU (6 FLOPs a trained parameter and token, 4 a frozen one, and attention) against the peak of the device and the mark that is
aimed at, peak memory of the device, seconds to the first step; then what the time of a step goes to (step_shares.py), and ratios
to TRL, which has its own packing, the kernel of --trl_attention and, where liger-kernel is installed, its fused loss. On a GPU each
case is measured with every kernel for attention that there is: the blocked one, which `auto` takes there, and flash.
--steps, --rows and --micro_rows make it fit a smaller machine. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench_train import ROOT, run_process
from step_shares import step_shares

MODELS = Path(__file__).with_name("recipe_models.json")
LENGTH = 4096


@dataclass(frozen=True)
class Case:
    """What is trained, and the MFU that it should reach."""

    recipe: str
    model: str  # its config.json is in MODELS
    tokenizer: str
    mark: float
    settings: tuple[str, ...] = ()
    lora: tuple[int, float] | None = None  # rank and alpha of the rival


CASES = {
    "full": Case("llama3_2_1b_full.py", "meta-llama/Llama-3.2-1B", "llama3", 0.50),
    "lora": Case("qwen3_8b_qlora.py", "Qwen/Qwen3-8B", "qwen3", 0.45, ("--config.adapter.base_dtype=",), (16, 32.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with the fields question and answer")
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder of Hugging Face tokenizer directories")
    parser.add_argument("--case", action="append", default=[], choices=sorted(CASES))
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--micro_rows", type=int, default=4, help="at a time")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="models of two narrow layers, to try this script without an accelerator")
    parser.add_argument("--peer", action="append", default=[], choices=["trl"])
    attention = ("auto", "flash") if shutil.which("nvidia-smi") else ("auto",)
    parser.add_argument("--attention", action="append", default=[], help=f"model.attention, each measured; here {' and '.join(attention)} by default")
    parser.add_argument("--trl_attention", default="flash_attention_2", help="attn_implementation of transformers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.case or CASES:
            model = make_model(Path(folder) / f"model_{name}", CASES[name], arguments)
            rates = {kernel: measure(name, kernel, model, arguments, Path(folder)) for kernel in arguments.attention or attention}
            for peer in dict.fromkeys(arguments.peer):
                compare(name, peer, model, rates, arguments, Path(folder))


def measure(name: str, attention: str, model: Path, arguments, work: Path) -> float:
    """Prints the lines of a case with a kernel for attention, and returns its real tokens/s."""
    case, title = CASES[name], f"sft_jax {name}, {attention}"
    workdir, dump = work / f"run_{name}_{attention}", work / f"program_{name}_{attention}"
    # Programs that come out of a cache are not written, and kernels that start as one graph have no names in the trace.
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=train_step"
    gpu = "" if os.environ.get("JAX_PLATFORMS", "cuda") in ("cpu", "tpu") else " --xla_gpu_enable_command_buffer="
    caches = {"XDG_CACHE_HOME": str(work / "cache")}
    command = [*ours(case, model, arguments), f"--config.model.attention={attention}"]
    timed = [*command, f"--config.train.steps={arguments.steps}", f"--workdir={workdir}"]
    _, seconds, _ = run_process(title, timed, caches)
    summary = json.loads((workdir / "summary.json").read_text())
    kept = ("real_tokens_per_second", "supervised_tokens_per_second", "seconds_to_first_step", "mfu", "peak_memory_bytes")
    result = {"case": title, **sizes(case, arguments), **{key: summary[key] for key in kept}, "mfu_mark": case.mark, "process_seconds": round(seconds, 1)}
    print(json.dumps(result), flush=True)

    profiled = [*command, "--config.train.steps=6", "--config.train.profile=3", f"--workdir={workdir}_profiled"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}{gpu}".strip()
    run_process(f"{title}, profiled", profiled, {**caches, "JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": flags})
    print(json.dumps({"case": f"{title}, shares of a step", **step_shares(Path(f"{workdir}_profiled") / "profile", dump)}), flush=True)
    return summary["real_tokens_per_second"]


def compare(name: str, peer: str, model: Path, rates: dict[str, float], arguments, work: Path) -> None:
    """Prints the line of a rival, and how many times its rate is ours with each kernel."""
    case = CASES[name]
    script = [sys.executable, str(ROOT / f"scripts/peers/{peer}_sft.py"), str(model), arguments.data]
    device = {"attention": arguments.trl_attention, "accumulation": arguments.rows // arguments.micro_rows, "lora": case.lora}
    numbers = map(str, (arguments.length, arguments.micro_rows, arguments.steps))
    text, seconds, _ = run_process(f"{peer} {name}", [*script, *numbers, json.dumps(device)], {"XDG_CACHE_HOME": str(work / "cache")})
    rival = json.loads(text.strip().splitlines()[-1])
    print(json.dumps({"case": f"{peer} {name}", **sizes(case, arguments), **rival, "process_seconds": round(seconds, 1)}), flush=True)
    ratios = {f"real_tokens_per_second, {kernel} / {peer}": round(rate / rival["real_tokens_per_second"], 3) for kernel, rate in rates.items()}
    print(json.dumps({"case": f"ratios {name}", **ratios}), flush=True)


def sizes(case: Case, arguments) -> dict:
    """Returns what is the same for us and for a rival."""
    return {"model": case.model, "rows": [arguments.rows, arguments.length], "micro_rows": arguments.micro_rows, "steps": arguments.steps}


def ours(case: Case, model: Path, arguments) -> list[str]:
    """Returns our command, without the number of steps and the folder of the run."""
    return [
        sys.executable, "-m", "sft_jax.train", f"--config={ROOT / 'configs' / case.recipe}", f"--config.model.path={model}",
        "--config.model.init=random", f"--config.data.train={arguments.data}", "--config.data.columns.prompt=question",
        "--config.data.columns.completion=answer", "--config.data.chat_template=none", f"--config.data.max_length={arguments.length}",
        "--config.data.max_segments=64", "--config.data.overlength=drop", f"--config.train.batch_size={arguments.rows}",
        f"--config.train.micro_batch_size={arguments.micro_rows}", "--config.train.epochs=1000", "--config.train.export=False", "--config.checkpoint.every=0",
        "--config.checkpoint.save_last=False", "--config.log.tensorboard=False", *case.settings,
    ]  # fmt: skip


def make_model(folder: Path, case: Case, arguments) -> Path:
    """A Hugging Face directory without weights."""
    folder.mkdir()
    config = json.loads(MODELS.read_text())[case.model]
    config["model_type"] = config["architectures"][0].removesuffix("ForCausalLM").lower()  # which transformers asks for
    if arguments.small:
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    source = arguments.tokenizers / case.tokenizer
    if not source.is_dir():
        sys.exit(f"--tokenizers: {source} is missing; the case needs the tokenizer of {case.model} there.")
    for file in source.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copyfile(file, folder / file.name)
    return folder


if __name__ == "__main__":
    main()
