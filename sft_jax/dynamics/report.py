"""An analysis for people: tables in the terminal."""

from collections.abc import Sequence

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sft_jax.dynamics.analysis import Analysis, Entry
from sft_jax.dynamics.groups import Group
from sft_jax.printable import printable


def report(analysis: Analysis) -> RenderableType:
    """Returns what rich prints: how sets and slices were learnt, the examples of each kind, and the worst of all."""
    unseen = f", {analysis.unseen:,} more never came up" if analysis.unseen else ""
    head = f"{analysis.examples:,} examples came up {analysis.exposures:,} times in {analysis.steps:,} steps{unseen}"
    parts: list[RenderableType] = [Text(printable(head)), _groups("data set", analysis.sets)]
    if analysis.column:
        parts.append(_groups(analysis.column, analysis.slices))
    for name, kind in analysis.kinds.items():
        if kind.count:
            parts.append(_entries(f"{name}: {kind.count:,} examples; {kind.about}", kind.examples))
        else:
            parts.append(Text(f"{name}: none"))
    parts.append(_entries("worst: by the mean distance from examples of the same time, in robust standard deviations", analysis.worst))
    return Stack(*parts, *(Text(printable(note)) for note in analysis.notes))


def _groups(what: str, groups: Sequence[Group]) -> Table:
    table = Table(expand=False)
    kinds = list(groups[0].found)
    table.add_column(Text(printable(what)), overflow="fold")
    for name in ("examples", "loss first", "loss last", "accuracy last", "all tokens right", *kinds):
        table.add_column(name.replace("_", " "), justify="right")
    for group in groups:
        table.add_row(
            Text(printable(group.name)), f"{group.examples:,}", f"{group.first_loss:.3f}", f"{group.last_loss:.3f}",
            f"{group.last_accuracy:.1%}", f"{group.learnt / group.examples:.1%}", *(f"{count:,}" for count in group.found.values()),
        )  # fmt: skip
    return table


def _entries(title: str, entries: Sequence[Entry]) -> Table:
    table = Table(title=Text(title), title_justify="left", expand=False)
    table.add_column("example", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    for entry in entries:
        texts = "\n".join(text for text in (entry.prompt, f"-> {entry.answer}") if text)
        table.add_row(Text(entry.where), f"{entry.score:.1f}", Text(f"{texts}\n{entry.detail}"))
    return table
