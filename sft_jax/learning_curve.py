"""Says how much data is enough: python -m sft_jax.learning_curve --config RECIPE.py --workdir runs/NAME

Trains on nested fractions of the training rows, by default 1/16, 1/8, 1/4, 1/2 and all of them, with more seeds where they are
few, and fits a power law to a held-out metric: what twice and four times the data would gain, with an interval, or that it cannot
be told. The cost is told before the first run. The same command continues what was stopped; runs that have finished are not run
again. Runs leave no model. Exit codes: 0 done, whatever the curve says; 3 some runs have failed; 2 wrong input, or every run has
failed; 75 stopped by a signal with the state saved.
"""

import contextlib
import sys

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError
from sft_jax.large_pages import use_large_pages

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the curve: results, and a folder for each run.")
_FRACTIONS = flags.DEFINE_list("fractions", ["1/16", "1/8", "1/4", "1/2", "1"], "Fractions of the training rows, three at least.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of the smallest fraction, from that of the recipe on; the largest has one, those between fewer.")
_BUDGET = flags.DEFINE_enum(
    "budget", "epochs", ["epochs", "steps"], "What is the same in all runs: passes over their rows, or steps, as many as with all data."
)
_METRIC = flags.DEFINE_string("metric", None, "What the curve is of: SET/loss, SET/exact_match. Default: checkpoint.best, else the loss.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say which runs there would be and what they cost; data are prepared, nothing is trained.")
_RETRY = flags.DEFINE_bool("retry", False, "Start runs that have failed before again.")
_JSON = flags.DEFINE_bool("json", False, "Write one JSON object to standard output.")


def main() -> None:
    raw = cli.read_raw_config(_CONFIG)
    if not _WORKDIR.value and not _DRY_RUN.value:
        raise UserError("--workdir: is missing; name the folder of the curve, such as --workdir runs/curve.")
    use_large_pages()

    from sft_jax.evaluation.tables import EvaluationProgress
    from sft_jax.experiments.engine import open_experiment, pinned
    from sft_jax.experiments.fractions import plan_curve, read_fractions
    from sft_jax.experiments.learning import run_curve
    from sft_jax.experiments.learning_report import plan_to_dict, report, run_lines, to_dict, write_results

    plan = plan_curve(
        pinned(raw, _WORKDIR.value), read_fractions(_FRACTIONS.value), _SEEDS.value, _BUDGET.value, _METRIC.value, _say
    )  # fmt: skip
    if _DRY_RUN.value:
        if _JSON.value:
            cli.print_json(plan_to_dict(plan))
        else:
            print("\n".join(run_lines(plan)))
        return
    for line in run_lines(plan):
        _say(line)
    with contextlib.closing(open_experiment(_WORKDIR.value)) as work:
        with EvaluationProgress() as progress:
            learning = run_curve(plan, work, _RETRY.value, _say, progress)
        files = write_results(learning, work)
    cli.show_results(to_dict(learning, files), report(learning), files, as_json=_JSON.value, failed=bool(learning.failed))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, __doc__)
