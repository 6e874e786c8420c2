"""Runs a grid or a list of settings and says which is best: python -m sft_jax.sweep --config RECIPE.py --workdir runs/NAME --grid KEY=V1,V2 ...

    ... --grid optim.learning_rate=1e-5,3e-5 adapter.rank=8,32 --seeds 3

runs every combination with every seed, each in WORKDIR/runs/NAME, and compares them by a held-out metric: a table here,
WORKDIR/results.csv, results.md and results.html. Keys, values, data and models are checked, and the cost is told, before the first
run. The same command continues a sweep that was stopped; runs that have finished are not run again. Exit codes: 0 done; 3 some
runs have failed; 2 wrong input, or every run has failed; 75 stopped by a signal with the state saved.
"""

import contextlib
import sys

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError
from sft_jax.experiments.overrides import spread_grid
from sft_jax.large_pages import use_large_pages

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep: results, and a folder for each run.")
_GRID = flags.DEFINE_multi_string("grid", [], "KEY=V1,V2: all combinations of these values; several behind one --grid, or several times.")
_LIST = flags.DEFINE_string("list", None, "In place of --grid: a file with a JSON object of keys and values a line, a setting each.")
_SEEDS = flags.DEFINE_string("seeds", "1", "Runs of each setting: how many seeds, from that of the recipe on, or a list such as 0,1,2.")
_METRIC = flags.DEFINE_string("metric", None, "What runs are compared by: SET/loss, SET/exact_match. Default: checkpoint.best, else the loss.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say which runs there would be and what they cost; data are prepared, nothing is trained.")
_RETRY = flags.DEFINE_bool("retry", False, "Start runs that have failed before again.")
_JSON = flags.DEFINE_bool("json", False, "Write one JSON object to standard output.")


def main() -> None:
    raw = cli.read_raw_config(_CONFIG)
    if not _WORKDIR.value and not _DRY_RUN.value:
        raise UserError("--workdir: is missing; name the folder of the sweep, such as --workdir runs/sweep.")
    if _GRID.value and _LIST.value:
        raise UserError("--grid, --list: both say which settings are run; give one of them.")

    from sft_jax.experiments.overrides import read_grid, read_list, read_seeds

    points = read_list(_LIST.value) if _LIST.value else read_grid(_GRID.value)
    seeds = read_seeds(_SEEDS.value, raw.get("seed") or 0)
    if _SEEDS.present and any("seed" in point for point in points):
        raise UserError("--seeds: the settings have seeds of their own (seed); give one of the two.")
    if len(points) * len(seeds) < 2 and not any(points):
        raise UserError("--grid: is missing; say what is to be compared, such as --grid optim.learning_rate=1e-5,3e-5.")
    use_large_pages()

    from sft_jax.evaluation.tables import EvaluationProgress
    from sft_jax.experiments.engine import open_experiment, pinned
    from sft_jax.experiments.sweep import plan_sweep, run_sweep
    from sft_jax.experiments.sweep_report import plan_to_dict, report, run_lines, to_dict, write_results

    plan = plan_sweep(pinned(raw, _WORKDIR.value), points, seeds, _METRIC.value, _say)
    if _DRY_RUN.value:
        if _JSON.value:
            cli.print_json(plan_to_dict(plan))
        else:
            print("\n".join(run_lines(plan)))
        return
    _say(str(plan))
    with contextlib.closing(open_experiment(_WORKDIR.value)) as work:
        with EvaluationProgress() as progress:
            sweep = run_sweep(plan, work, _RETRY.value, _say, progress)
        files = write_results(sweep, work)
    cli.show_results(to_dict(sweep, files), report(sweep), files, as_json=_JSON.value, failed=bool(sweep.failed))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.argv[:] = spread_grid(sys.argv)
    cli.run(main, __doc__)
