"""Checks what must hold of training, on your own model, data and mesh: python -m sft_jax.selfcheck --config configs/NAME.py

Packing, isolation of documents, accumulation, the layout over devices, the loss in chunks, evaluation and adapters are computed
in two ways each, which must agree; a batch must be learnable; two short runs, one of them stopped in the middle, must
save the same bits, notice a damaged checkpoint and export what they trained. Takes a few minutes and, for the runs, the disk
space of two checkpoints and two exports. Exit codes: 0 all that could be checked holds; 3 something does not; 2 wrong input;
75 stopped by a signal.
"""

import os
import sys
from pathlib import Path

from absl import flags

from sft_jax import cli
from sft_jax.large_pages import use_large_pages

_CONFIG = cli.define_config_flag()
_ONLY = flags.DEFINE_list("only", [], "Contracts to check, such as packing,layout,resume; default: all.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the short runs, which then stay; default: a temporary one.")
_JSON = flags.DEFINE_bool("json", False, "Write one JSON object to standard output.")


def main() -> None:
    config = cli.read_config(_CONFIG)
    use_large_pages()

    from sft_jax.checking.checks import CONTRACTS, check, check_names
    from sft_jax.checking.report import Table, to_dict
    from sft_jax.checking.subject import open_subject
    from sft_jax.training.clusters import check_alone
    from sft_jax.training.platform import set_up_platform

    check_names(_ONLY.value)  # before the model and the data are read
    check_alone("a selfcheck", os.environ)  # its checks read whole arrays, and its short runs join no others once JAX is used
    set_up_platform(config.train.deterministic)
    subject = open_subject(config, log=lambda message: print(message, file=sys.stderr))
    outcomes = []
    with Table(subject, not _JSON.value, len(set(_ONLY.value) or CONTRACTS)) as table:
        for outcome in check(subject, _ONLY.value, Path(_WORKDIR.value) if _WORKDIR.value else None, table.begin):
            outcomes.append(outcome)
            table.add(outcome)
    if _JSON.value:
        cli.print_json(to_dict(subject, outcomes))
    if any(outcome.state == "FAILS" for outcome in outcomes):
        sys.exit(cli.EXIT_FINDINGS)


if __name__ == "__main__":
    cli.run(main, __doc__)
