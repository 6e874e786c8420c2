"""Influence for people: tables in the terminal."""

from collections.abc import Sequence

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sft_jax.influence.run import Failing, Influence, Influencing

_SHOWN = 5  # failing examples in the terminal


def influence_report(influence: Influence) -> RenderableType:
    """Returns what rich prints: the failing examples, and the training examples at either end."""
    failing = (
        f"Held-out examples that the state of step {influence.step:,} fails at, token by token: {len(influence.failing):,} taken of "
        f"{influence.looked_at:,} looked at"
    )
    parts = [
        _table(failing, "loss", [(entry, f"{entry.loss:.3f}") for entry in influence.failing[:_SHOWN]]),
        _table("harmful: training on them raises that loss", "influence", _scored(influence.harmful)),
        _table("helpful: training on them lowers it", "influence", _scored(influence.helpful)),
    ]
    return Stack(*parts, *map(Text, influence.notes))


def _scored(entries: Sequence[Influencing]) -> list[tuple[Influencing, str]]:
    return [(entry, f"{entry.influence:+.3f}") for entry in entries]


def _table(title: str, measure: str, entries: Sequence[tuple[Failing | Influencing, str]]) -> Table:
    table = Table(title=Text(title), title_justify="left", expand=False)
    table.add_column("example", overflow="fold")
    table.add_column(measure, justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    for entry, value in entries:
        turn = f" (turn {entry.turn})" if entry.turn >= 0 else ""
        texts = "\n".join(text for text in (entry.prompt, f"-> {entry.answer}") if text)
        table.add_row(Text(f"{entry.file}:{entry.line}{turn}"), value, Text(texts))
    return table
