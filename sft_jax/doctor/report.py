"""A diagnosis for people: a table in the terminal, and a part of a page."""

import html

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sft_jax.doctor.findings import Diagnosis, KindResult

SHOWN = 3  # findings of a kind in the terminal
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def table(diagnosis: Diagnosis) -> RenderableType:
    """Returns what rich prints: a line a kind with its first findings, then what was not looked at, and the diversity."""
    result = Table(title=f"{diagnosis.rows:,} rows in {', '.join(diagnosis.sets)}", title_justify="left", expand=False)
    result.add_column("kind", no_wrap=True)
    result.add_column("rows", justify="right", no_wrap=True)
    result.add_column("share", justify="right", no_wrap=True)
    result.add_column("first found", overflow="fold")
    for kind, found in diagnosis.kinds.items():
        if found.rows:
            examples = [f"{finding.file}:{finding.line} {finding.detail}" for finding in found.findings[:SHOWN]]
            result.add_row(
                Text(kind, style=_COLOURS[found.severity]),
                f"{found.rows:,}",
                share(found.rows, diagnosis.rows),
                Text("\n".join(examples)),
            )
    parts: list[RenderableType] = [result] if result.row_count else [Text(f"{diagnosis.rows:,} rows: nothing found.")]
    return Group(*parts, *(Text(line) for line in [*_usual(diagnosis), *diagnosis.notes, *diversity_lines(diagnosis)]))


def html_section(diagnosis: Diagnosis) -> str:
    """Returns the diagnosis as HTML for a section of a page: every finding that is listed, everything escaped."""
    lines = []
    found = {kind: result for kind, result in diagnosis.kinds.items() if result.rows}
    if not found:
        lines.append(f"<p>{diagnosis.rows:,} rows: nothing found.</p>")
    else:
        lines.append(
            "<table><thead><tr><th>kind</th><th>severity</th><th>rows</th><th>share</th><th>found</th></tr></thead><tbody>"
        )
        lines += [_html_row(kind, result, diagnosis.rows) for kind, result in found.items()]
        lines.append("</tbody></table>")
    lines += [f"<p>{html.escape(line)}</p>" for line in [*_usual(diagnosis), *diagnosis.notes]]
    lines.append("<h3>Diversity</h3>")
    lines += [f"<p>{html.escape(line)}</p>" for line in diversity_lines(diagnosis)]
    return "\n".join([*lines, ""])


def _html_row(kind: str, result: KindResult, rows: int) -> str:
    items = "".join(
        f"<li><code>{html.escape(f'{finding.file}:{finding.line}')}</code> {html.escape(finding.detail)}</li>"
        for finding in result.findings
    )
    more = result.rows - len(result.findings)
    rest = f"<p>and {more:,} more</p>" if more else ""
    return (
        f"<tr class='{result.severity}'><td>{html.escape(kind)}</td><td>{result.severity}</td><td>{result.rows:,}</td>"
        f"<td>{share(result.rows, rows)}</td>"
        f"<td><details><summary>{html.escape(result.about)}</summary><ul>{items}</ul>{rest}</details></td></tr>"
    )


def _usual(diagnosis: Diagnosis) -> list[str]:
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
        lines.append(f"Mean similarity of two rows: {100 * found['self_similarity']:.2f}%.")
    clusters = found["prompt_clusters"]
    if clusters is not None:
        lines.append(
            f"Prompts fall into {len(clusters['clusters'])} clusters; "
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
