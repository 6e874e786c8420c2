"""TRL's SFTTrainer on the same work, with its own packing: trl_sft.py MODEL DATA LENGTH BATCH STEPS [DEVICE]; prints one JSON line.

Counts what TRL really feeds: real tokens are those that are not padding, supervised ones those with a label. DEVICE is a JSON
object for a GPU, where it trains in bfloat16: {"attention": attn_implementation, "accumulation": micro-batches of a step,
"lora": [rank, alpha] or null}; without it, float32 on the CPU.
"""

import importlib.util
import json
import os
import sys
import tempfile
import time

import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

WARM_UP_STEPS = 2


class Clock(TrainerCallback):
    """Notes the time at the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.time())


def main(model_path: str, data: str, length: int, batch: int, steps: int, device: dict | None = None) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    options, lora = on_cpu(), None
    settings = {}
    if device is not None:
        options, lora = on_gpu(device)
        dtype = torch.float32 if lora is None else torch.bfloat16  # of what is stored; a frozen base needs no float32
        settings = {"attn_implementation": device["attention"], "dtype": dtype}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path), **settings)
    rows = load_dataset("json", data_files=data, split="train").rename_columns({"question": "prompt", "answer": "completion"})
    counted = []

    class Counted(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            labels = inputs["labels"]
            real = inputs["attention_mask"].sum() if "attention_mask" in inputs else (inputs["position_ids"] >= 0).sum()
            counted.append((int(real), int((labels != -100).sum())))
            return super().compute_loss(model, inputs, *args, **kwargs)

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_length=length, packing=True, per_device_train_batch_size=batch, max_steps=steps,
            completion_only_loss=True, learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=1, fp16=False, logging_steps=steps,
            save_strategy="no", report_to=[], disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = Counted(model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[clock], peft_config=lora)
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[WARM_UP_STEPS - 1]
    skipped = WARM_UP_STEPS * options.get("gradient_accumulation_steps", 1)
    real, supervised = (sum(entry[i] for entry in counted[skipped:]) for i in (0, 1))
    memory = {} if device is None else {"peak_memory_bytes": {"device": torch.cuda.max_memory_allocated()}, "liger": options["use_liger_kernel"]}
    print(json.dumps({
        "real_tokens_per_second": round(real / seconds, 1), "supervised_tokens_per_second": round(supervised / seconds, 1),
        "seconds_to_first_step": round(clock.ends[0] - float(os.environ["BENCH_START"]), 2), **memory,
    }))  # fmt: skip


def on_cpu() -> dict:
    return {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def on_gpu(device: dict) -> tuple[dict, object]:
    """Returns the options of SFTConfig, and those of the adapter or None."""
    lora = None
    if device["lora"] is not None:
        from peft import LoraConfig

        rank, alpha = device["lora"]
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {
        "bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": device["accumulation"],
        "use_liger_kernel": importlib.util.find_spec("liger_kernel") is not None,
    }  # fmt: skip
    return options, lora


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), *map(json.loads, sys.argv[6:]))
