"""Pre-train the base model of the quickstart from nothing: 1.3M parameters on text that the project generates.

    python scripts/make_nano_corpus.py
    python scripts/make_nano_tokenizer.py          (only when the vocabulary should change; the committed one is its output)
    python -m sft_jax.train --config configs/pretrain_nano.py --workdir runs/pretrain_nano
    cp runs/pretrain_nano/export/model.safetensors models/nano/

Run it in the root of the repository; it takes about twenty minutes on two CPU cores and ends at a held-out loss of 0.41
nats a token. Plain next-token prediction is supervised fine-tuning of `text` rows, every token supervised, with weights
drawn from the seed.
"""

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.model.path = "models/nano"  # config.json and tokenizer; its weights are not read
    config.model.init = "random"
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.data.train = "runs/nano_corpus/train.jsonl"
    config.data.eval = {"held_out": "runs/nano_corpus/held_out.jsonl"}
    config.data.format = "text"
    config.data.max_length = 256
    config.train.epochs = 1.0
    config.train.batch_size = 8
    config.optim.learning_rate = 4e-3
    config.optim.warmup = 0.05
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.0
    config.eval.every = 500
    config.checkpoint.every = 500
    return config
