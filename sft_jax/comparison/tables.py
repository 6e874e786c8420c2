"""A comparison for people: contenders, pairs and advice in the terminal."""

import textwrap
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table

from sft_jax.comparison.advice import Judged, p_text
from sft_jax.comparison.results import Comparison
from sft_jax.evaluation.tables import brackets, new_table
from sft_jax.printable import printable

_MOST_PAIRS = 15  # beyond, only those with the highest score are shown
_WIDTH = 120  # of sentences


def contender_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Returns the headings and cells of the table of contenders; what is the same nothing for all is left out."""
    found = comparison.to_dict()["contenders"]
    columns: list[tuple[str, list[str]]] = [("contender", [each["name"] for each in found])]
    for name in comparison.scorers:
        scores = [each["scores"][name] for each in found]
        columns.append((name, ["-" if score["value"] is None else f"{score['value']:.4f}{brackets(score['interval'])}" for score in scores]))
        if any(score["answers"] != len(comparison.questions) for score in scores):
            columns.append(("answers", [f"{score['answers']:,}" for score in scores]))
    columns.append(("prompt tokens", [f"{each['prompt_tokens']:,.1f}" for each in found]))
    columns.append(("answer tokens", [f"{each['answer_tokens']:,.1f}" for each in found]))
    if comparison.prices:
        columns.append(("cost of 1,000", [f"{each['cost_per_1000']:,.4f}" for each in found]))
    if any(each["latency"] for each in found):
        latencies = [each["latency"] for each in found]
        columns.append(("seconds (p90)", ["-" if one is None else f"{one['median']:.3f} ({one['p90']:.3f})" for one in latencies]))
    for key, heading in (("not_fitting", "do not fit"), ("unfinished", "cut off")):
        if any(each[key] for each in found):
            columns.append((heading, [f"{each[key]:,}" for each in found]))
    return [heading for heading, _ in columns], [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]


def latency_line(comparison: Comparison) -> str:
    """Returns what the seconds of the table are; "" where none were measured."""
    prompts = max((each.latency.prompts for each in comparison.answered if each.latency is not None), default=0)
    return f"seconds: median and 90th percentile of {prompts:,} requests, one at a time, on this machine" if prompts else ""


def pair_rows(comparison: Comparison, scorer: str) -> tuple[list[list[str]], int]:
    """Returns the cells of the table of pairs by a scorer, and how many pairs are left out since there are too many."""
    pairs = comparison.pairs[scorer]
    values = [each.scored[scorer].value for each in comparison.answered]
    best = max(range(len(values)), key=lambda place: values[place] if values[place] == values[place] else float("-inf"))
    shown = {places: judged for places, judged in pairs.items() if len(pairs) <= _MOST_PAIRS or best in places}
    names = [each.contender.name for each in comparison.answered]
    return [[names[one], names[other], *_cells(judged)] for (one, other), judged in shown.items()], len(pairs) - len(shown)


PAIR_HEAD = ("contender", "against", "difference", "p (Holm)", "wins", "losses", "ties")


def _cells(judged: Judged) -> Sequence[str]:
    pair = judged.pair
    ends = None if pair.interval is None else list(pair.interval)
    p = p_text(judged.p).removeprefix("p = ").removeprefix("p ")
    return f"{pair.difference:+.4f}{brackets(ends)}", p, f"{pair.wins:,}", f"{pair.losses:,}", f"{pair.ties:,}"


def print_tables(comparison: Comparison) -> None:
    """Prints the tables and the advice on standard output; where it is no terminal, as wide as they are."""
    console = rich.console.Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = rich.console.Console(highlight=False, markup=False, width=240)
    console.print(f"{len(comparison.questions):,} rows of {printable(comparison.set_name)}")
    head, rows = contender_rows(comparison)
    _print(console, head, rows, 1)
    if latency_line(comparison):
        console.print(latency_line(comparison))
    for scorer in comparison.scorers:
        rows, left_out = pair_rows(comparison, scorer)
        _print(console, [f"{scorer}: contender", *PAIR_HEAD[1:]], rows, 2)
        if left_out:
            console.print(f"{left_out:,} pairs without the highest score are in --json and --out alone.")
    for sentence in advice_lines(comparison):
        console.print(textwrap.fill(printable(sentence), _WIDTH))


def advice_lines(comparison: Comparison) -> Sequence[str]:
    """Returns the sentences of advice, or why there is none."""
    if comparison.advice is not None:
        return comparison.advice.sentences
    return [f"No advice: two contenders have no answers that {comparison.scorers[0]} can compare."]


def _print(console: rich.console.Console, head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> None:
    """Prints a table whose first `texts` columns stand to the left."""
    table = new_table(head[:texts], head[texts:])
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table)
