"""The doctor's whole visit: rows go to workers, what they find out goes to the checks of sets, then it is told."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console

from sft_jax.config import Config, DataConfig
from sft_jax.data.stores.build import describe
from sft_jax.data.stores.maker import cores
from sft_jax.data.stores.workers import Failure, WorkerPool
from sft_jax.doctor import facts
from sft_jax.doctor.checks import CHECKS, SET_CHECKS
from sft_jax.doctor.clean import prepare_folder, removed_kinds, write_cleaned
from sft_jax.doctor.collection import Collection, open_collection
from sft_jax.doctor.collector import Collector
from sft_jax.doctor.diversity import Diversity
from sft_jax.doctor.facts import Facts
from sft_jax.doctor.findings import LISTED, LISTED_IN_JSON, Diagnosis, parse_limits
from sft_jax.doctor.report import table
from sft_jax.doctor.template_marks import control_tokens_of

WIDTH = 160  # of a table that goes to a file
EXIT_CLEAN, EXIT_FINDINGS = 0, 3
Log = Callable[[str], None]
Between = Callable[[int, int], None]  # (rows that were looked at, of all)
_TOLD = 256  # rows between two looks at how many are done


def run_check(
    config: Config,
    *,
    benchmark: Sequence[str] = (),
    fix: str | None = None,
    fix_kinds: Sequence[str] = (),
    as_json: bool = False,
    limit: str = "0",
    console: Console | None = None,
    log: Log = lambda line: None,
) -> int:
    """Looks at the data sets of a configuration, prints what is found, and returns the exit code.

    Args:
        config: its `data` section names the rows. Of a model only the control tokens are read, where `model.path` is a folder.
        benchmark: files of rows of any kind, or globs, that training rows are compared with beside `data.eval`.
        fix: a folder for a cleaned copy of every file, see `sft_jax.doctor.clean`; None writes nothing.
        fix_kinds: kinds whose rows are left out of it; none named: those that CHECKS says.
        as_json: prints `Diagnosis.to_json()` with "limits_exceeded" instead of a table.
        limit: see `parse_limits`; "0" allows no row with a fault that is an error.
        console: where it is printed; None is standard output.
        log: takes lines about what is done.

    Returns 0, or 3 where more is found than `limit` allows (in the files as they are, also with `fix`). Raises UserError.
    """
    limits = parse_limits(limit, tuple(CHECKS))
    kinds = removed_kinds(fix_kinds, fix)
    if fix is not None:
        prepare_folder(fix)
    listed = LISTED_IN_JSON if as_json else LISTED
    diagnosis, rows, collector = _examine(
        config.data, benchmark, config.model.path, limits.kinds, listed, kinds if fix is not None else (), log
    )
    exceeded = limits.exceeded(diagnosis)
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    if as_json:
        report = {**diagnosis.to_json(), "limits_exceeded": exceeded}
        print(json.dumps(report, indent=2), file=console.file)  # of megabytes, for which rich takes a second each
    else:
        console.print(table(diagnosis))
        if exceeded:
            console.print(f"More than allowed: {', '.join(exceeded)}.", highlight=False, markup=False, soft_wrap=True)
    if fix is not None:
        write_cleaned(fix, rows, collector, kinds, log)
    return EXIT_FINDINGS if exceeded else EXIT_CLEAN


def diagnose(
    config: DataConfig,
    benchmark: Sequence[str] = (),
    *,
    model_path: str = "",
    counted: Iterable[str] = (),
    log: Log = lambda line: None,
    between: Between = lambda done, total: None,
) -> Diagnosis:
    """Looks at the data sets of a configuration. Raises UserError where there are none to look at.

    Args:
        config: names the rows.
        benchmark: files that training rows are compared with, too.
        model_path: of a model whose control tokens content should not hold; "" = of none.
        counted: kinds that are counted however usual they are in a set.
        log: takes lines about what is done.
        between: is told now and then how many rows of all were looked at.
    """
    return _examine(config, benchmark, model_path, counted, LISTED, (), log, between)[0]


def _examine(
    config: DataConfig,
    benchmark: Sequence[str],
    model_path: str,
    counted: Iterable[str],
    listed: int,
    keep_all: Sequence[str],
    log: Log,
    between: Between = lambda done, total: None,
) -> tuple[Diagnosis, Collection, Collector]:
    rows = open_collection(config, benchmark, log)
    collector, diversity = Collector(rows, keep_all, counted, listed), Diversity(rows)
    checks = [check(rows) for check in SET_CHECKS]
    unread = 0  # rows of a benchmark
    log(f"Looking at {len(rows):,} rows.")
    control = control_tokens_of(model_path) | frozenset(config.add_tokens)
    for row, number, found in _all_facts(config, rows, control):
        if row % _TOLD == 0 or row == len(rows) - 1:
            between(row + 1, len(rows))
        of_benchmark = rows.sets[number].split == "benchmark"
        for kind, detail in found.faults:
            if not of_benchmark:
                collector.add(kind, row, detail)
        if found.faults and found.faults[0][0] == "unreadable":
            unread += of_benchmark
            continue
        for check in checks:
            check.add(row, number, found)
        diversity.add(row, number, found)
    log("Comparing rows.")
    for check in checks:
        check.finish(collector.add)
    collector.close()
    notes = [f"{unread:,} rows of the benchmark cannot be read and were compared with nothing."] if unread else []
    if not any(item.split != "train" for item in rows.sets):
        notes.append("There is no data.eval and no --benchmark, so no overlap was looked for.")
    sets = {
        item.key: len(item.rows)
        for item in sorted(rows.sets, key=lambda item: item.split != "train")
        if item.split != "benchmark"
    }
    return Diagnosis(sets, collector.results(), diversity.measure(), tuple(notes)), rows, collector


def _all_facts(config: DataConfig, rows: Collection, control: frozenset[str]) -> Iterator[tuple[int, int, Facts]]:
    """Yields (row, number of its set, facts) of all rows in order, however many processes find them out."""
    setup = facts.Setup(tuple((item.format, item.columns, item.split) for item in rows.sets), control)
    count = min(config.workers or cores(), -(-len(rows) // facts.CHUNK))
    with WorkerPool(facts.TARGET, setup, count, config.row_timeout, config.row_memory_mb) as pool:
        for items, outcome in pool.run(rows.chunks(facts.CHUNK)):
            if isinstance(outcome, Failure):
                outcome = [Facts([("unreadable", f"checking it {describe(outcome)}")])]
            for (row, number, _), found in zip(items, outcome, strict=True):
                yield row, number, found
