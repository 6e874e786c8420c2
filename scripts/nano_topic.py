"""The form in which the pre-training text is written down: a topic is a set of templates of `nano_world`.

Slots that share a tag share their value through the whole document, so names, times and amounts come back in it: in
words here, in figures there, bare, in quotation marks, in a record. That is what a reader of the text can learn.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """prose: sentences; talk: lines of two people, in pairs (`~` before an order
    that takes a polite frame); records: JSON objects as they stand in files."""

    prose: tuple[str, ...]
    talk: tuple[tuple[str, str], ...]
    records: tuple[str, ...]


def lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(tuple(part.strip() for part in line.split("|")) for line in lines(text))
