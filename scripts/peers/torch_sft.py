"""A plain torch loop on the same packed rows: torch_sft.py MODEL DATA LENGTH BATCH STEPS; prints one JSON line.

transformers' model with SDPA, isolated documents by a block mask and restarted positions, AdamW, full logits. The rows
are those of sft_jax (data preparation uses no JAX), so the work is the same to the token.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_jax.config_parsing import parse_config
from sft_jax.data.prepare import prepare

WARM_UP_STEPS = 2


def main(model_path: str, data: str, length: int, batch: int, steps: int) -> None:
    torch.manual_seed(0)
    config = parse_config({
        "model": {"path": model_path},
        "data": {"train": data, "columns": {"prompt": "question", "completion": "answer"}, "chat_template": "none",
                 "max_length": length, "overlength": "drop"},
        "train": {"batch_size": batch, "steps": steps},
    })  # fmt: skip
    rows = prepare(config.data, model_path=model_path, rows=steps * batch, log=lambda line: None).train
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path), attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, foreach=True)
    causal = torch.tril(torch.ones(length, length, dtype=torch.bool))
    ends, counted = [], []
    for step in range(steps):
        packed = rows.read(step * batch, batch)
        tokens, targets, segments, positions = (torch.from_numpy(x).long() for x in (packed.tokens, packed.targets, packed.segments, packed.positions))
        weights = torch.from_numpy(packed.weights)
        same = (segments[:, :, None] == segments[:, None, :]) & causal
        logits = model(input_ids=tokens, attention_mask=same[:, None], position_ids=positions, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.time())
        counted.append((int((segments > 0).sum()), int((weights > 0).sum())))
    seconds = ends[-1] - ends[WARM_UP_STEPS - 1]
    real, supervised = (sum(entry[i] for entry in counted[WARM_UP_STEPS:]) for i in (0, 1))
    print(json.dumps({
        "real_tokens_per_second": round(real / seconds, 1), "supervised_tokens_per_second": round(supervised / seconds, 1),
        "seconds_to_first_step": round(ends[0] - float(os.environ["BENCH_START"]), 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
