"""Fine-tune any model on any data; everything from flags.

    python -m sft_jax.train --config configs/sft.py --workdir runs/mine \\
        --config.model.path=MODEL --config.data.train=train.jsonl --config.data.eval=held_out.jsonl

`MODEL` is a Hugging Face directory or hub id, the workdir of an earlier run, or an adapter of PEFT. Rows are in
JSONL, JSON, CSV, Parquet, Arrow or ArrayRecord files, here or behind a URL, `tfds:name:split` or `hf:owner/name:split`: chats,
prompt/completion pairs, alpaca, ShareGPT, plain text, segments or tokens; the format is detected. Flags that are often wanted:

    --config.data.max_length=4096             tokens in a packed row (documents share rows and never see each other)
    --config.data.columns.prompt=question     names of the fields, where they are not the standard ones
    --config.train.epochs=3                   or --config.train.steps=1000
    --config.train.batch_size=32              rows of max_length in an optimizer step, over all devices
    --config.train.micro_batch_size=8         rows at a time, for less memory; the step computes the same
    --config.optim.learning_rate=2e-5
    --config.adapter.name=lora                train an adapter beside the model (with a learning rate of about 2e-4)
    --config.eval.every=200                   steps; --config.eval.generate=64 also answers and scores 64 prompts
    --config.mesh.tensor=2                    devices along each axis: data, fsdp (-1: all that are left), tensor

Every key and its default: sft_jax/config.py. `configs/sft.py:float32` computes in float32 instead of bfloat16, which
is what a CPU is faster at.
"""

from sft_jax.config import default_config
from sft_jax.errors import UserError


def get_config(arg: str = ""):
    """Returns the defaults. `arg` is the part after the colon: "" or "float32"."""
    config = default_config()
    if arg == "float32":
        config.model.compute_dtype = "float32"
    elif arg:
        raise UserError(f"configs/sft.py:{arg}: the part after the colon is 'float32' or nothing.")
    return config
