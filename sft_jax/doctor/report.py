"""A diagnosis for people: a table in the terminal, and the lines below it."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sft_jax.doctor.findings import Diagnosis
from sft_jax.printable import printable

SHOWN = 3  # findings of a kind in the terminal
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def table(diagnosis: Diagnosis) -> RenderableType:
    """Returns what rich prints: a line a kind with its first findings, then what was not looked at, and the diversity."""
    result = Table(title=Text(printable(f"{diagnosis.rows:,} rows in {', '.join(diagnosis.sets)}")), title_justify="left", expand=False)
    result.add_column("kind", no_wrap=True)
    result.add_column("rows", justify="right", no_wrap=True)
    result.add_column("share", justify="right", no_wrap=True)
    result.add_column("first found", overflow="fold")
    for kind, found in diagnosis.kinds.items():
        if found.rows:
            examples = [printable(f"{finding.file}:{finding.line} {finding.detail}") for finding in found.findings[:SHOWN]]
            result.add_row(
                Text(kind, style=_COLOURS[found.severity]),
                f"{found.rows:,}",
                share(found.rows, diagnosis.rows),
                Text("\n".join(examples)),
            )
    parts: list[RenderableType] = [result] if result.row_count else [Text(f"{diagnosis.rows:,} rows: nothing found.")]
    return Group(*parts, *(Text(printable(line)) for line in [*usual_lines(diagnosis), *diagnosis.notes, *diversity_lines(diagnosis)]))


def usual_lines(diagnosis: Diagnosis) -> list[str]:
    """Returns what is so common in a set that it is no fault there."""
    return [
        f"{kind}: so many rows of {', '.join(result.usual)} are like this that it is no fault of theirs, and none is counted."
        for kind, result in diagnosis.kinds.items()
        if result.usual
    ]


def diversity_lines(diagnosis: Diagnosis) -> list[str]:
    """Returns the diversity block in lines of text."""
    found = diagnosis.diversity
    lines = []
    for what, ratios in found["distinct_ngrams"].items():
        parts = [f"{100 * ratio:.1f}% of runs of {size}" for size, ratio in ratios.items() if ratio is not None]
        if parts:
            lines.append(f"Distinct words in {what} of {found['sampled_rows']:,} rows: {', '.join(parts)}.")
    if found["self_similarity"] is not None:
        lines.append(f"Mean similarity of two of {found['compared_rows']:,} rows: {100 * found['self_similarity']:.2f}%.")
    clusters = found["prompt_clusters"]
    if clusters is not None:
        lines.append(
            f"Prompts of {found['sampled_rows']:,} rows fall into {len(clusters['clusters'])} clusters; "
            f"the largest has {100 * clusters['largest_share']:.1f}% of them:"
        )
        lines += [f"  {100 * each['share']:5.1f}%  {each['example']}" for each in clusters["clusters"]]
    if len(found["sets"]) > 1:
        lines.append("Shares of rows and of words:")
        lines += [
            f"  {100 * each['share_of_rows']:5.1f}%  {100 * each['share_of_words']:5.1f}%  {each['set']}"
            for each in found["sets"]
        ]
    return lines


def share(count: int, rows: int) -> str:
    """Returns a count as a share of all rows.

    >>> share(1, 8)
    '12.5%'
    """
    value = 100 * count / max(1, rows)
    return "<0.1%" if 0 < value < 0.1 else f"{value:.1f}%"
