"""Fine-tunes a model: python -m sft_jax.train --config configs/sft.py --workdir runs/NAME [--config.KEY=VALUE ...]

The same command continues a run that was stopped. Exit codes: 0 done, 2 wrong input, 75 stopped by a signal with the
state saved, or before there was anything to save.
"""

import os

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError
from sft_jax.large_pages import use_large_pages
from sft_jax.training.clusters import as_variables, find_place

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: configuration, metrics, checkpoints, export.")
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "Of several processes: HOST:PORT of the first one (JAX_COORDINATOR_ADDRESS).")
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes the run has (JAX_NUM_PROCESSES).", lower_bound=1)
_INDEX = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on (JAX_PROCESS_ID).", lower_bound=0)


def main() -> None:
    config = cli.read_config(_CONFIG)  # before jax is imported: a wrong key is told at once
    if not _WORKDIR.value:
        raise UserError("--workdir: is missing; name the folder of the run, such as --workdir runs/first.")
    os.environ.update(as_variables(_ADDRESS.value, _COUNT.value, _INDEX.value))
    find_place(os.environ)  # what is told in part is refused before anything is imported
    use_large_pages()

    from sft_jax.training.run import fit

    fit(config, _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, __doc__)
