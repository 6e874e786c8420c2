"""The defaults of every key as a recipe: what `--config.KEY=VALUE` is read against where no `--config` is given."""

from sft_jax.config import default_config


def get_config():
    return default_config()
