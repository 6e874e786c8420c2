"""Teach a 1.3M-parameter model to turn requests into JSON commands: no network, no accelerator, a few minutes.

    python -m sft_jax.train --config configs/quickstart.py --workdir runs/quickstart

Run it in the root of the repository: `models/nano` and `data/quickstart` are relative to it. `make quickstart` runs
the same. The base model has read plain text only (configs/pretrain_nano.py); the run prints its exact match on the
held-out requests at step 0 and that of the tuned model at the end, and exports the tuned model.
"""

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "models/nano"
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.data.train = "data/quickstart/train.jsonl"
    config.data.eval = {"held_out": "data/quickstart/held_out.jsonl"}
    config.data.max_length = 256
    config.train.epochs = 2.0
    config.train.batch_size = 8
    config.optim.learning_rate = 2e-3
    config.optim.b2 = 0.98
    config.eval.batch_size = 64
    config.eval.generate = 256  # every held-out prompt
    config.eval.max_new_tokens = 64
    config.checkpoint.every = 0
    return config
