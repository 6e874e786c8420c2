"""Shows what is trained on: python -m sft_jax.inspect_data --config configs/sft.py [--config.KEY=VALUE ...]

The recipe and its keys are those of training. Examples as they are rendered, with the weight of every token; with --rows the
packed rows of training; with --html FILE both in one page, with statistics of all data; with --json one object an example. It
needs a tokenizer and no weights. Rows that cannot be used are shown with the reason. With --check it looks for faults: duplicates,
overlap with held-out data, empty and cut answers and more, by file and line, and needs no model; --fix DIR writes a cleaned copy.
Exit codes: 0 done; 2 wrong input; 3 more faults than --allow says.
"""

import sys
from pathlib import Path

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_HTML = flags.DEFINE_string("html", None, "Write one page with everything to this file.")
_JSON = flags.DEFINE_bool("json", False, "Write one JSON object an example to standard output, in the order of the data.")
_ROWS = flags.DEFINE_bool("rows", False, "Show packed rows of training instead of examples.")
_IDS = flags.DEFINE_bool("ids", False, "Show every token with its id and weight; with --rows also its target.")
_WHITESPACE = flags.DEFINE_bool("whitespace", False, "Make spaces, tabs and newlines visible.")
_LIMIT = flags.DEFINE_integer("limit", None, "Show so many, at most; 0 = all. Default: 10, in a page 500, with --json all.")
_SET = flags.DEFINE_string("set", "", "Only the data set of this name.")
_ROW = flags.DEFINE_string(
    "row", "", "Only this row: its number in the data set, or file:line; with --rows the number of a packed row."
)
_LONGEST = flags.DEFINE_integer("longest", 0, "Only so many of the longest examples, longest first.")
_CUT = flags.DEFINE_bool("cut", False, "Only examples cut at the seam of an answer (class cut), or too long for a row.")
_ZERO_WEIGHT = flags.DEFINE_bool("zero_weight", False, "Only what has no token that is trained on.")
_PROBLEMS = flags.DEFINE_bool("problems", False, "Only what has a problem.")
_SEARCH = flags.DEFINE_string("search", "", "Only examples whose text or problem holds this, in any case.")
_REGEX = flags.DEFINE_string("regex", "", "Only examples in whose text or problem this pattern is found.")

_CHECK = flags.DEFINE_bool("check", False, "Look for faults of the data instead; with --html as a part of the page.")
_BENCHMARK = flags.DEFINE_list("benchmark", [], "With --check: files of rows that training rows are compared with, beside data.eval.")
_ALLOW = flags.DEFINE_string(
    "allow", "0", "With --check: rows, or a share of them, that may have a fault of each kind that is an error, and of kinds by "
    "name, such as 0,refusal=1%."
)  # fmt: skip
_FIX = flags.DEFINE_string("fix", None, "With --check: write a cleaned copy of the data, and what was left out, to this new folder.")
_FIX_KINDS = flags.DEFINE_list("fix_kinds", [], "With --fix: leave out rows with faults of these kinds; default: those that are safe.")

_TERMINAL_LIMIT, _PAGE_LIMIT, _PAGE_ROWS = 10, 500, 20


def main() -> None:
    judged_only = _CHECK.value and _HTML.value is None
    config = cli.read_config(_CONFIG, needs_model=not judged_only)
    _check_flags()
    if judged_only:
        from sft_jax.doctor.check import run_check

        sys.exit(run_check(
            config, benchmark=_BENCHMARK.value, fix=_FIX.value, fix_kinds=_FIX_KINDS.value, as_json=_JSON.value,
            limit=_ALLOW.value, log=_say,
        ))  # fmt: skip

    from sft_jax.inspection.filters import Filters
    from sft_jax.inspection.subject import open_subject
    from sft_jax.training.resolved import data_model

    filters = Filters(
        _SET.value, _ROW.value, _LONGEST.value, _CUT.value, _ZERO_WEIGHT.value, _PROBLEMS.value, _SEARCH.value, _REGEX.value
    )
    config, tokenizer, vocab_size = data_model(config, _say)
    subject = open_subject(config, tokenizer, vocab_size, log=_say)
    if _HTML.value is not None:
        _write_page(subject, filters, config)
    elif _JSON.value:
        _write_json(subject, filters)
    else:
        _show(subject, filters)


def _check_flags() -> None:
    """Raises UserError for flags that contradict each other."""
    shown = [
        name
        for name, value in (("--html", _HTML.value), ("--json", _JSON.value), ("--rows", _ROWS.value))
        if value not in (None, False)
    ]
    if len(shown) > 1:
        raise UserError(f"{', '.join(shown)}: only one of them; a page has the packed rows too, and --json is of examples.")
    for name, holder in (("--limit", _LIMIT), ("--longest", _LONGEST)):
        if (holder.value or 0) < 0:
            raise UserError(f"{name}: must be 0 (all) or more, not {holder.value}.")
    examples = {
        "--rows": _ROWS, "--ids": _IDS, "--whitespace": _WHITESPACE, "--limit": _LIMIT, "--set": _SET, "--row": _ROW,
        "--longest": _LONGEST, "--cut": _CUT, "--zero_weight": _ZERO_WEIGHT, "--problems": _PROBLEMS, "--search": _SEARCH,
        "--regex": _REGEX,
    }  # fmt: skip
    doctor = {"--benchmark": _BENCHMARK, "--allow": _ALLOW, "--fix": _FIX, "--fix_kinds": _FIX_KINDS}
    for name, holder in doctor.items():
        if holder.present and not _CHECK.value:
            raise UserError(f"{name}: is of --check; give that too, or leave {name} out.")
        if holder.present and _HTML.value is not None and name.startswith("--fix"):
            raise UserError(f"{name}: a page changes nothing; leave out --html, or {name}.")
    for name, holder in examples.items():
        if holder.present and _CHECK.value and _HTML.value is None:
            raise UserError(f"{name}: is of examples that are shown, and --check looks at all data; leave one of them out.")
    for name, holder in (("--ids", _IDS), ("--whitespace", _WHITESPACE)):
        if holder.value and shown and shown != ["--rows"]:
            raise UserError(f"{name}: is of what is shown in the terminal; leave out {name} or {shown[0]}.")


def _show(subject, filters) -> None:
    from sft_jax.inspection.filters import Selection
    from sft_jax.inspection.packed import PackedSelection
    from sft_jax.inspection.terminal import TerminalView

    view = TerminalView(subject.data.tokenizer, ids=_IDS.value, whitespace=_WHITESPACE.value)
    selection = PackedSelection(subject, filters) if _ROWS.value else Selection(subject, filters)
    show, what = (view.row, "packed rows") if _ROWS.value else (view.example, "examples")
    limit = _TERMINAL_LIMIT if _LIMIT.value is None else _LIMIT.value
    shown = 0
    view.legend()
    for item in selection.take(limit):
        show(item)
        shown += 1
    rest = " Show more with --limit." if shown < selection.matched else ""
    view.say(f"\nShown: {shown:,} of {selection.matched:,} {what} that match, of {selection.of:,}.{rest}")


def _write_json(subject, filters) -> None:
    from sft_jax.inspection.filters import Selection
    from sft_jax.inspection.records import line

    selection = Selection(subject, filters)
    written = 0
    for detail in selection.take(_LIMIT.value or 0):
        sys.stdout.write(line(detail, subject.data.tokenizer) + "\n")
        written += 1
    sys.stdout.flush()
    _say(f"Written: {written:,} of {selection.matched:,} examples that match, of {selection.of:,}.")


def _write_page(subject, filters, config) -> None:
    """Writes the page. With --check it has a section of faults, and the process ends with the exit code that they ask for."""
    from sft_jax.inspection.page import Section, write_page

    sections, exceeded = [], []
    if _CHECK.value:
        from sft_jax.doctor.check import EXIT_FINDINGS, diagnose
        from sft_jax.doctor.checks import CHECKS
        from sft_jax.doctor.findings import parse_limits
        from sft_jax.inspection.page_faults import fault_section

        limits = parse_limits(_ALLOW.value, tuple(CHECKS))
        diagnosis = diagnose(config.data, _BENCHMARK.value, model_path=config.model.path, counted=limits.kinds, log=_say)
        sections, exceeded = [Section("faults", "Faults", fault_section(diagnosis))], limits.exceeded(diagnosis)
    path = Path(_HTML.value).expanduser()
    limit = _PAGE_LIMIT if _LIMIT.value is None else _LIMIT.value
    _say(write_page(path, subject, filters, most_examples=limit, most_rows=_PAGE_ROWS, sections=sections))
    if exceeded:
        _say(f"More than allowed: {', '.join(exceeded)}.")
        sys.exit(EXIT_FINDINGS)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__)
