"""Says why the result of a run is disappointing, with evidence: python -m sft_jax.report runs/NAME [--html page.html]

Reads what the run has left in its folder, its data, and what it exported; looks for causes in an order in which the first that is
found is the one to remove; and names each with its numbers and the keys that change it. --html writes everything into one page
that loads nothing. What needs the data, the tokenizer or the models is left out with --quick. Exit codes: 0 done; 2 wrong input.
"""

import json
import sys
from pathlib import Path

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_WIDTH = 160  # of what goes to a file

_JSON = flags.DEFINE_bool("json", False, "Write one JSON object to standard output.")
_HTML = flags.DEFINE_string("html", None, "Write one page with everything to this file.")
_QUICK = flags.DEFINE_bool("quick", False, "Read the files of the run alone: no data, no tokenizers and no models.")


def main(folders: list[str]) -> None:
    if not folders:
        raise UserError("the folder of a run is missing; name one, such as python -m sft_jax.report runs/first.")

    from sft_jax.diagnosis.diagnose import examine

    report = examine(folders[0], quick=_QUICK.value, log=_say)
    if _HTML.value is not None:
        from sft_jax.diagnosis.page import write_page

        _say(write_page(Path(_HTML.value).expanduser(), report))
    if _JSON.value:
        print(json.dumps(report.to_json(), allow_nan=False))
        return
    from rich.console import Console

    from sft_jax.diagnosis.terminal import report_text

    Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False).print(report_text(report))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__, arguments=1)
