"""LoRA on Gemma 3 4B on a v5e-8 slice (8 chips of 16 GB).

    python -m sft_jax.train --config configs/gemma3_4b_lora.py --workdir runs/gemma-4b-lora \\
        --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

The checkpoint is the multimodal one: its text model is trained, and its vision tower is carried along into a merged export.
16 rows of 4096 tokens in a step, 8 at a time.
"""

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "google/gemma-3-4b-it"
    config.model.dtype = "bfloat16"
    config.adapter.name = "lora"
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.data.max_length = 4096
    config.optim.learning_rate = 2e-4
    config.train.epochs = 2.0
    config.train.batch_size = 16
    config.train.micro_batch_size = 8
    return config
