"""Fine-tune all of Qwen3 0.6B on one GPU with 24 GB or more.

    python -m sft_jax.train --config configs/qwen3_0_6b_full.py --workdir runs/qwen-0.6b \\
        --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

16 rows of 4096 tokens in a step, 2 at a time; the head over 151,936 tokens is never held for all of them. The template
is the model's own; `data.chat_template_kwargs` passes it arguments, such as {"enable_thinking": False}.
"""

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "Qwen/Qwen3-0.6B"
    config.data.max_length = 4096
    config.optim.learning_rate = 2e-5
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.micro_batch_size = 2
    return config
