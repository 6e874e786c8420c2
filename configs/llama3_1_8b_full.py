"""Fine-tune all of Llama 3.1 8B on a TPU slice.

    python -m sft_jax.train --config configs/llama3_1_8b_full.py:v5p-16 --workdir runs/llama-8b \\
        --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

started on every host of the slice with the same arguments and a workdir that all of them see. The part after the colon is
the slice: v5e-64 (64 chips of 16 GB) or v5p-16 (8 chips of 95 GB). 64 rows of 4096 tokens in a step. Parameters, gradients
and optimizer state are float32, 128 GB in all, divided over the chips.
"""

from sft_jax.config import default_config
from sft_jax.errors import UserError

ROWS_AT_A_TIME = {"v5e-64": 64, "v5p-16": 16}  # one, and two, a chip


def get_config(arg: str = "v5p-16"):
    if arg not in ROWS_AT_A_TIME:
        raise UserError(f"configs/llama3_1_8b_full.py:{arg}: the part after the colon is v5e-64 or v5p-16.")
    config = default_config()
    config.model.path = "meta-llama/Llama-3.1-8B"
    config.data.max_length = 4096
    config.optim.learning_rate = 1e-5
    config.train.epochs = 2.0
    config.train.batch_size = 64
    config.train.micro_batch_size = ROWS_AT_A_TIME[arg]
    config.mesh.fsdp = -1
    return config
