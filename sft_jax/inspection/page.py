"""One self-contained page: what is trained on, with statistics of all data. It loads nothing and can be read without scripts.

A section is a heading with HTML below it; `page` puts them together, so that others can add their own.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from sft_jax.errors import UserError
from sft_jax.inspection.filters import Filters
from sft_jax.inspection.markup import escape
from sft_jax.inspection.page_examples import example_section, row_section
from sft_jax.inspection.page_numbers import fact_section, plot_section, problem_section
from sft_jax.inspection.subject import Subject


class Section(NamedTuple):
    """A part of the page."""

    anchor: str
    heading: str
    body: str  # HTML, with all content escaped; see sft_jax.inspection.markup


def write_page(
    path: Path, subject: Subject, filters: Filters, *, most_examples: int, most_rows: int, sections: Sequence[Section] = ()
) -> str:
    """Writes the page of a subject and returns a line that says what is in it.

    Args:
        filters: of the examples; statistics and problems are those of all data.
        most_examples: that the page holds at most, 0 = all.
        most_rows: training rows that it holds at most.
        sections: what else to show, before the examples.

    Raises UserError where the file cannot be written.
    """
    examples, what = example_section(subject, filters, most_examples)
    text = page(
        "What is trained on",
        [
            Section("data", "Data", fact_section(subject)),
            Section("plots", "Statistics of all data", plot_section(subject)),
            Section("problems", "Problems", problem_section(subject)),
            *sections,
            Section("examples", "Examples", examples),
            Section("rows", "Packed rows", row_section(subject, most_rows)),
        ],
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--html: {path} cannot be written ({error.strerror}); name a file in a folder that is there."
        ) from error
    return f"{path}: {what}"


def page(title: str, sections: Sequence[Section]) -> str:
    """Returns an HTML document. Scripts other than its own are refused by its content security policy."""
    style, script = (
        resources.files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    links = "".join(f'<a href="#{part.anchor}">{escape(part.heading)}</a>' for part in sections)
    body = "".join(
        f'<section id="{part.anchor}" aria-labelledby="{part.anchor}-heading">'
        f'<h2 id="{part.anchor}-heading">{escape(part.heading)}</h2>{part.body}</section>\n'
        for part in sections
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{style}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>{body}</main><script>{script}</script></body></html>\n'
    )
