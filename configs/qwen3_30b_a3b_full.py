"""Fine-tune all of Qwen3 30B-A3B, a mixture of 128 experts, on a v5p-64 slice (32 chips of 95 GB).

    python -m sft_jax.train --config configs/qwen3_30b_a3b_full.py --workdir runs/qwen-30b \\
        --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

started on every host of the slice with the same arguments and a workdir that all of them see. 64 rows of 4096 tokens in a
step. The balance of the experts is kept by a small term of the loss; `router_balance` and `expert_load_peak` in the log say
how even it is.
"""

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "Qwen/Qwen3-30B-A3B"
    config.model.dtype = "bfloat16"  # rounded stochastically, so that small updates are not lost
    config.data.max_length = 4096
    config.optim.learning_rate = 1e-5
    config.loss.router_balance = 1e-3
    config.train.epochs = 2.0
    config.train.batch_size = 64
    config.train.micro_batch_size = 32
    config.mesh.fsdp = -1
    return config
