"""What is counted while rows are prepared: of a shard, and added up, of a data set."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

FIELDS_NAMED = 100  # unused fields that are counted by name, the most frequent; data may have keys for names


@dataclass
class RowCounts:
    """Counts of rows [first, stop). Those of a data set are the sum of those of its shards, whoever prepared them."""

    rows: int = 0
    used_rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # how rows became examples, see sft_jax.data.examples.BuiltRow
    counts: Counter[str] = field(default_factory=Counter)  # see sft_jax.data.chats.chat.COUNTS
    unused_fields: Counter[str] = field(default_factory=Counter)  # rows with a field that nothing reads, by its name
    added_tokens: Counter[str] = field(default_factory=Counter)  # how often each of data.add_tokens occurs
    read_clock: bool = False  # rendering has asked for the date
    watched: int = 0  # rows of which the watchdog ended the preparation
    largest: dict[str, int] = field(default_factory=lambda: {"id": -1, "file": 0, "line": 0})  # token id, first row with it

    def add(self, other: "RowCounts") -> None:
        """Adds the counts of later rows."""
        for name in ("rows", "used_rows", "watched"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("kinds", "counts", "unused_fields", "added_tokens"):
            getattr(self, name).update(getattr(other, name))
        self.read_clock |= other.read_clock
        if other.largest["id"] > self.largest["id"]:
            self.largest = other.largest

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types, in an order that does not depend on that of the rows."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: dict(sorted(value.items())) if isinstance(value, dict) else value for name, value in values.items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "RowCounts":
        """Returns the counts of a `to_dict`."""
        counters = ("kinds", "counts", "unused_fields", "added_tokens")
        return RowCounts(**{name: Counter(value) if name in counters else value for name, value in values.items()})

    def summary(self) -> dict[str, Any]:
        """Returns `to_dict` with the most frequent unused fields alone, and how many more there are."""
        most = sorted(self.unused_fields.items(), key=lambda item: (-item[1], item[0]))
        more = max(0, len(most) - FIELDS_NAMED)
        return {**self.to_dict(), "unused_fields": dict(most[:FIELDS_NAMED]), "more_unused_fields": more}
