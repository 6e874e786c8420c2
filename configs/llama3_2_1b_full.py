"""Fine-tune all of Llama 3.2 1B on one GPU or TPU chip with 48 GB or more.

    python -m sft_jax.train --config configs/llama3_2_1b_full.py --workdir runs/llama-1b \\
        --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

16 rows of 4096 tokens in a step, 4 at a time; one at a time (--config.train.micro_batch_size=1) 40 GB are enough. Parameters and
optimizer state are float32 (15 GB), matmuls bfloat16. The base model has no chat template of its own:
--config.model.path=meta-llama/Llama-3.2-1B-Instruct brings one, or name one with --config.data.chat_template=chatml.
"""

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "meta-llama/Llama-3.2-1B"
    config.data.max_length = 4096
    config.optim.learning_rate = 1e-5
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.micro_batch_size = 4
    return config
