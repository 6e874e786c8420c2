"""The part of the page that is about faults: what the doctor has found."""

from sft_jax.doctor.findings import Diagnosis, KindResult
from sft_jax.doctor.report import diversity_lines, share, usual_lines
from sft_jax.inspection.markup import escape


def fault_section(diagnosis: Diagnosis) -> str:
    """Returns the diagnosis as HTML: a row a kind, in which every finding that is listed can be opened; then the diversity."""
    found = {kind: result for kind, result in diagnosis.kinds.items() if result.rows}
    parts = [f"<p>{diagnosis.rows:,} rows: nothing found.</p>"]
    if found:
        head = "".join(f"<th>{name}</th>" for name in ("kind", "severity", "rows", "share", "found"))
        rows = "".join(_row(kind, result, diagnosis.rows) for kind, result in found.items())
        parts = [f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"]
    parts += [f"<p>{escape(line)}</p>" for line in [*usual_lines(diagnosis), *diagnosis.notes]]
    return "\n".join([*parts, "<h3>Diversity</h3>", *(f"<p>{escape(line)}</p>" for line in diversity_lines(diagnosis)), ""])


def _row(kind: str, result: KindResult, rows: int) -> str:
    items = "".join(f"<li><code>{escape(f'{each.file}:{each.line}')}</code> {escape(each.detail)}</li>" for each in result.findings)
    more = result.rows - len(result.findings)
    rest = f"<p>and {more:,} more</p>" if more else ""
    return (
        f"<tr><td>{escape(kind)}</td><td>{result.severity}</td><td>{result.rows:,}</td><td>{share(result.rows, rows)}</td>"
        f"<td><details><summary>{escape(result.about)}</summary><ul>{items}</ul>{rest}</details></td></tr>"
    )
