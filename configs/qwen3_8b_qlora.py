"""LoRA on a 4-bit Qwen3 8B on one GPU of 16 GB.

    python -m sft_jax.train --config configs/qwen3_8b_qlora.py --workdir runs/qwen-8b-qlora \\
        --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

The frozen kernels are stored as NF4 (QLoRA, arXiv:2305.14314), which takes 4.5 bits a parameter; embedding and head, which
stay bfloat16, take 2.5 GB. 16 rows of 2048 tokens in a step, one at a time.
"""

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "Qwen/Qwen3-8B"
    config.model.dtype = "bfloat16"
    config.adapter.name = "lora"
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.adapter.base_dtype = "nf4"
    config.data.max_length = 2048
    config.optim.learning_rate = 2e-4
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.micro_batch_size = 1
    return config
