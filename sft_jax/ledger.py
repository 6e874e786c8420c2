"""Tells which examples a run has not learnt, and why: python -m sft_jax.ledger --workdir runs/NAME

Every run keeps the loss of each training example whenever it comes up (WORKDIR/ledger). This reads it, and names by file and line
what was never learnt, forgotten, learnt late, contradicts another row with the same prompt, or is an outlier among answers of its
length; with --slice COLUMN also how the rows with each value of a column were learnt. With --influence it names the training
examples that pull the model away from held-out ones that it fails at, by their gradients, which takes as long as a few epochs of
training. Rows are shown with personal data masked. Exit codes: 0 done; 2 wrong input.
"""

import sys

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_WIDTH = 160  # of tables that go to a file

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_LIMIT = flags.DEFINE_integer("limit", 10, "List so many examples of each kind, at most; 0 = all.")
_SET = flags.DEFINE_string("set", "", "List examples of the training set of this name only.")
_SLICE = flags.DEFINE_string("slice", "", "A column of the rows, such as source or meta.topic: how each of its values was learnt.")
_JSON = flags.DEFINE_bool("json", False, "Write one JSON object to standard output.")

_INFLUENCE = flags.DEFINE_bool("influence", False, "Also look for training examples behind held-out ones that the run fails at.")
_INFLUENCE_SET = flags.DEFINE_string("influence_set", "", "With --influence: only held-out examples of this set of data.eval.")
_INFLUENCE_WHERE = flags.DEFINE_string(
    "influence_where", "", "With --influence: only held-out rows with this value of a column, such as topic=lights."
)
_FAILING = flags.DEFINE_integer("failing", 32, "With --influence: look at so many failing examples, at most, those with the highest loss.")
_SEED = flags.DEFINE_integer("seed", 0, "With --influence: of the random projection.")


def main() -> None:
    if not _WORKDIR.value:
        raise UserError("--workdir: is missing; name the folder of a run, such as --workdir runs/first.")
    if _LIMIT.value < 0:
        raise UserError(f"--limit: must be 0 (all) or more, not {_LIMIT.value}.")
    if _FAILING.value < 1:
        raise UserError(f"--failing: must be 1 or more, not {_FAILING.value}.")
    for holder in (_INFLUENCE_SET, _INFLUENCE_WHERE, _FAILING, _SEED):
        if holder.present and not _INFLUENCE.value:
            raise UserError(f"--{holder.name}: is of --influence; give that too, or leave --{holder.name} out.")

    from sft_jax.dynamics.analysis import analyse, open_ledger

    ledger = open_ledger(_WORKDIR.value, log=_say)
    analysis = analyse(ledger, column=_SLICE.value, set_name=_SET.value, limit=_LIMIT.value)
    influence = None
    if _INFLUENCE.value:
        from sft_jax.influence.run import find_influence
        from sft_jax.training.platform import set_up_platform

        set_up_platform(deterministic=False)
        influence = find_influence(
            ledger, set_name=_INFLUENCE_SET.value, where=_INFLUENCE_WHERE.value, failing=_FAILING.value, limit=_LIMIT.value,
            seed=_SEED.value, log=_say,
        )  # fmt: skip
    if _JSON.value:
        cli.print_json({**analysis.to_json(), "influence": influence.to_json() if influence else None})
        return
    from rich.console import Console

    from sft_jax.dynamics.report import report

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(report(analysis))
    if influence is not None:
        from sft_jax.influence.report import influence_report

        console.print(influence_report(influence))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__)
