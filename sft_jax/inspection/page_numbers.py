"""The parts of the page that are about all data: facts, plots, losses by length, problems."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from sft_jax.inspection.markup import escape
from sft_jax.inspection.plots import grouped_bars, length_histogram, share_histogram
from sft_jax.inspection.statistics import problem_count, problems, row_fill, shares
from sft_jax.inspection.subject import InspectedSet, Subject

MOST_PROBLEMS = 5_000  # rows of the table


def fact_section(subject: Subject) -> str:
    """Returns the totals and a table of the data sets."""
    train = subject.data.train
    found = sum(problem_count(item) for item in subject.sets)
    beyond = sum(int(item.shortened.beyond_cap.sum()) for item in subject.sets)
    facts = [
        ("rows read", f"{sum(len(item.rows) for item in subject.sets):,}"),
        ("examples", f"{sum(len(item.store) for item in subject.sets):,}"),
        ("training rows", f"{train.total_rows:,} × {train.max_length:,}"),
        ("of it filled", f"{100 * train.real_tokens / (train.total_rows * train.max_length):.1f}%"),
        ("tokens in them", f"{train.real_tokens:,}"),
        ("supervised", f"{train.supervised_tokens:,}"),
        *([("beyond the cap", f"{beyond:,}")] if beyond else []),
        ("problems", f"{found:,}"),
    ]
    boxes = "".join(
        f"<div{' class=alert' if name == 'problems' and found else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts
    )
    rows = [_set_row(item) for item in subject.sets]
    head = ("set", "files", "format", "rows", "unusable", "examples", "class", "tokens", "supervised", "longest")
    return f'<dl class="facts">{boxes}</dl><p></p>{table(head, rows, numbers={3, 4, 5, 7, 8, 9}, where=1)}'


def _set_row(item: InspectedSet) -> list[str]:
    store, sizes = item.store, item.shortened
    kinds = ", ".join(f"{kind.replace('_', '-')} {count:,}" for kind, count in store.meta["kinds"].items())
    files = ", ".join(item.rows.names[:3]) + (f" and {len(item.rows.names) - 3:,} more" if len(item.rows.names) > 3 else "")
    tokens, supervised = int(sizes.tokens.sum()), int(sizes.supervised.sum())
    return [
        f"{item.name} ({item.split})", files, store.meta["format"], f"{len(item.rows):,}", f"{len(store.bad_rows):,}",
        f"{len(store):,}", kinds, f"{tokens:,}", f"{supervised:,} ({100 * supervised / tokens:.1f}%)",
        f"{int(sizes.tokens.max()):,}",
    ]  # fmt: skip


def plot_section(subject: Subject) -> str:
    """Returns the plots, and what the over-length policies lose."""
    limit = subject.config.max_length + 1
    figures = []
    for item in subject.sets:
        label, sizes = f"{item.name} ({item.split})", item.shortened
        figures.append(length_histogram(sizes.tokens, limit, label))
        figures.append(
            share_histogram(
                sizes.supervised / np.maximum(1, sizes.tokens - 1),
                f"{label}: examples by supervised share",
                "tokens that are supervised",
                "examples",
            )  # fmt: skip
        )
    streams = {"training": subject.data.train, **{f"{name} (eval)": stream for name, stream in subject.data.eval.items()}}
    for name, stream in streams.items():
        figures.append(
            share_histogram(
                row_fill(stream) / stream.max_length,
                f"{name}: packed rows by how full they are",
                "positions that hold a token",
                "rows",
            )
        )
    names, parts = [item.name for item in subject.sets if item.split == "train"], shares(subject)
    groups = [("documents", parts.documents), ("supervised tokens", parts.supervised)]
    figures.append(grouped_bars(names, groups, "Shares of the training sets, as rows are packed", "share of all training rows"))
    return f'<div class="plots">{"".join(figures)}</div><h3>What does not fit a row</h3>{_length_losses(subject)}'


def _length_losses(subject: Subject) -> str:
    limit = subject.config.max_length + 1
    rows = []
    for item in subject.sets:
        sizes = item.shortened
        long = sizes.problematic()
        lost, supervised = int(sizes.positions_lost.sum()), int(sizes.supervised_lost.sum())
        share = 100 * supervised / max(1, int(sizes.supervised.sum()))
        rows.append(
            [f"{item.name} ({item.split})", sizes.policy, f"{int(long.sum()):,}", f"{int((sizes.pieces[long] == 0).sum()):,}",
             f"{lost:,}", f"{supervised:,} ({share:.2f}%)"]
        )  # fmt: skip
    told = (
        f"<p>An example of more than {limit:,} tokens does not fit (data.max_length {limit - 1:,}, and one more that is a "
        "target only)."
    )
    if any(item.config.overlength == "error" and item.shortened.too_long().any() for item in subject.sets):
        told += " Under data.overlength=error a run stops at it; packed rows are shown here as with data.overlength=split."
    if any((item.shortened.beyond_cap & item.shortened.too_long()).any() for item in subject.sets):
        told += " What the cap of a set leaves out is not counted."
    head = ("set", "data.overlength", "too long", "of them left out", "tokens lost", "supervised tokens lost")
    return f"{told}</p>{table(head, rows, numbers={2, 3, 4, 5})}"


def problem_section(subject: Subject) -> str:
    """Returns a table of rows that cannot be used and examples that do not fit."""
    total = sum(problem_count(item) for item in subject.sets)
    if not total:
        return "<p>None: every row can be used, and every example that is used fits a row.</p>"
    found = islice((problem for item in subject.sets for problem in problems(item)), MOST_PROBLEMS)
    rows = [[f"{one.set.name} ({one.set.split})", f"{one.file}:{one.line}", one.reason] for one in found]
    more = (
        f"The first {MOST_PROBLEMS:,} of {total:,}; --json --problems writes all."
        if total > MOST_PROBLEMS
        else f"{total:,} in all."
    )
    unused = sum(len(item.store.bad_rows) for item in subject.sets)
    told = f"<p>{unused:,} rows cannot be used, {total - unused:,} examples do not fit a row. {more}</p>"
    return told + table(("set", "row", "problem"), rows, where=1, tall=True)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: set[int] = frozenset(), where: int = -1, tall: bool = False
) -> str:
    """Returns a table of texts. Columns `numbers` stand to the right; column `where` has files, which may be long."""

    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="number"' if column in numbers else ' class="where"' if column == where and tag == "td" else ""
        return f"<{tag}{' scope=col' if tag == 'th' else ''}{kind}>{escape(text)}</{tag}>"

    header = "".join(cell("th", column, text) for column, text in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', column, text) for column, text in enumerate(row))}</tr>" for row in rows)
    kind = "scroll tall" if tall else "scroll"
    return (
        f'<div class="{kind}" role="region" aria-label="Table" tabindex="0">'
        f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )
