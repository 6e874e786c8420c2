"""Tells which examples a run has not learnt, and why: python -m sft_jax.ledger --workdir runs/NAME

Every run keeps the loss of each training example whenever it comes up (WORKDIR/ledger). This reads it, and names by file and line
what was never learnt, forgotten, learnt late, contradicts another row with the same prompt, or is an outlier among answers of its
length; with --slice COLUMN also how the rows with each value of a column were learnt. With --influence it names the training
examples that pull the model away from held-out ones that it fails at, by their gradients, which takes about as long as training an
epoch. Rows are shown with personal data masked. Exit codes: 0 done; 2 wrong input.
"""

import json
import sys

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_LIMIT = flags.DEFINE_integer("limit", 10, "List so many examples of each kind, at most; 0 = all.")
_SET = flags.DEFINE_string("set", "", "List examples of the training set of this name only.")
_SLICE = flags.DEFINE_string("slice", "", "A column of the rows, such as source or meta.topic: how each of its values was learnt.")
_JSON = flags.DEFINE_bool("json", False, "Write one JSON object to standard output.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir: is missing; name the folder of a run, such as --workdir runs/first.")
    if _LIMIT.value < 0:
        raise UserError(f"--limit: must be 0 (all) or more, not {_LIMIT.value}.")

    from sft_jax.dynamics.analysis import analyse, open_ledger

    ledger = open_ledger(_WORKDIR.value, log=_say)
    analysis = analyse(ledger, column=_SLICE.value, set_name=_SET.value, limit=_LIMIT.value)
    if _JSON.value:
        print(json.dumps(analysis.to_json()))
        return
    from rich.console import Console

    from sft_jax.dynamics.report import report

    Console(width=None if sys.stdout.isatty() else 160).print(report(analysis))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__)
