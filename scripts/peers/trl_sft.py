"""TRL's SFTTrainer on the same work, with its own packing: trl_sft.py MODEL DATA LENGTH BATCH STEPS; prints one JSON line.

Counts what TRL really feeds: real tokens are those that are not padding, supervised ones those with a label.
"""

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


def main(model_path: str, data: str, length: int, batch: int, steps: int) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
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
            completion_only_loss=True, learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=1, bf16=False, fp16=False,
            use_cpu=True, gradient_checkpointing=False, logging_steps=steps, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Counted(model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])
        trainer.train()
    seconds = clock.ends[-1] - clock.ends[WARM_UP_STEPS - 1]
    real, supervised = (sum(entry[i] for entry in counted[WARM_UP_STEPS:]) for i in (0, 1))
    print(json.dumps({
        "real_tokens_per_second": round(real / seconds, 1), "supervised_tokens_per_second": round(supervised / seconds, 1),
        "seconds_to_first_step": round(clock.ends[0] - float(os.environ["BENCH_START"]), 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
