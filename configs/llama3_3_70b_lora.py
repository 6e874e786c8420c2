"""LoRA on Llama 3.3 70B on a v5p-32 slice (16 chips of 95 GB) or eight GPUs of 141 GB.

    python -m sft_jax.train --config configs/llama3_3_70b_lora.py:v5p-32 --workdir runs/llama-70b-lora \\
        --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

The part after the colon is v5p-32, started on every host of the slice with a workdir that all of them see, or h200x8. The
frozen base is bfloat16, 141 GB divided over the devices. 32 rows of 4096 tokens in a step, one a device at a time.
"""

from sft_jax.config import default_config
from sft_jax.errors import UserError

DEVICES = {"v5p-32": 16, "h200x8": 8}


def get_config(arg: str = "v5p-32"):
    if arg not in DEVICES:
        raise UserError(f"configs/llama3_3_70b_lora.py:{arg}: the part after the colon is v5p-32 or h200x8.")
    config = default_config()
    config.model.path = "meta-llama/Llama-3.3-70B-Instruct"
    config.model.dtype = "bfloat16"
    config.adapter.name = "lora"
    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.data.max_length = 4096
    config.optim.learning_rate = 1e-4
    config.train.epochs = 1.0
    config.train.batch_size = 32
    config.train.micro_batch_size = DEVICES[arg]
    config.mesh.fsdp = -1
    return config
