"""Says why the result of a run is disappointing, with evidence: python -m sft_jax.report runs/NAME [runs/OTHER] [--html page.html]

Reads what the run has left in its folder, its data, and what it exported; looks for causes in an order in which the first that is
found is the one to remove; and names each with its numbers and the keys that change it. --html writes everything into one page
that loads nothing. What needs the data, the tokenizer or the models is left out with --quick. Of two runs it tells what was set
otherwise and what came of it, with their curves in one plot. Exit codes: 0 done; 2 wrong input.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_WIDTH = 160  # of what goes to a file

_JSON = flags.DEFINE_bool("json", False, "Write one JSON object to standard output.")
_HTML = flags.DEFINE_string("html", None, "Write one page with everything to this file.")
_GENERAL = flags.DEFINE_string("general", None, "A file of text that the model should still know: its loss before and after training.")
_QUICK = flags.DEFINE_bool("quick", False, "Read the files of the run alone: no data, no tokenizers and no models.")


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("the folder of a run is missing; name one, such as python -m sft_jax.report runs/first.")
    if _GENERAL.value is not None and _QUICK.value:
        raise UserError("--general: is read with the models, which --quick leaves out; leave one of them out.")
    page = Path(_HTML.value).expanduser() if _HTML.value is not None else None
    if page is not None and not page.parent.is_dir():
        raise UserError(f"--html: there is no folder {page.parent}; make it, or name a file in another one.")

    from sft_jax.diagnosis.compare import compare, comparison_text, write_comparison
    from sft_jax.diagnosis.diagnose import examine
    from sft_jax.diagnosis.page import write_page
    from sft_jax.diagnosis.run_files import read_run
    from sft_jax.diagnosis.terminal import report_text
    from sft_jax.evaluation.tables import EvaluationProgress

    for folder in folders:  # what is no run is told before any of them is looked at
        read_run(folder)
    measure = None if _QUICK.value else _measure()
    reports = [examine(folder, quick=_QUICK.value, measure=measure, log=_say, bars=EvaluationProgress) for folder in folders]
    if len(reports) == 1:
        (found,) = reports
        text, write = report_text, write_page
    else:
        found = compare(*reports)
        text, write = comparison_text, write_comparison
    if page is not None:
        _say(write(page, found))
    if _JSON.value:
        cli.print_json(found.to_json())
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False).print(text(found))


def _measure() -> Callable:
    """Returns what computes with the models of a run."""
    from sft_jax.diagnosis.measure import measure, read_general
    from sft_jax.evaluation.tables import EvaluationProgress
    from sft_jax.hf.progress import LoadProgress
    from sft_jax.model.sharding import make_mesh
    from sft_jax.training.platform import set_up_platform

    general = read_general(Path(_GENERAL.value).expanduser()) if _GENERAL.value is not None else ""
    set_up_platform(False)
    return partial(measure, mesh=make_mesh(), general=general, log=_say, loading=LoadProgress, bars=EvaluationProgress)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__, arguments=2)
