"""LoRA on Llama 3.1 8B on one GPU of 80 GB.

    python -m sft_jax.train --config configs/llama3_1_8b_lora.py --workdir runs/llama-8b-lora \\
        --config.data.train=train.jsonl --config.data.eval=held_out.jsonl
    python -m sft_jax.export --model runs/llama-8b-lora --adapter --out adapter     # for peft and servers
    python -m sft_jax.export --model runs/llama-8b-lora --merge --out merged        # a plain model

Rank 16 on all linear layers; the base is bfloat16 and frozen. 16 rows of 4096 tokens in a step, 2 at a time.
"""

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "meta-llama/Llama-3.1-8B-Instruct"
    config.model.dtype = "bfloat16"
    config.adapter.name = "lora"
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.data.max_length = 4096
    config.optim.learning_rate = 2e-4
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.micro_batch_size = 2
    return config
