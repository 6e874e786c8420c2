"""Circumstances: what prepared rows may depend on beside their fingerprint, and whether they do is known only once they are made.

A template that reads the clock makes other tokens on another day, and a row that ran into a limit of the watchdog may
pass under a higher one. Most rows depend on neither and are used for ever. Shards and stores that do carry the
circumstances in their names, so they are used again under the same ones only; under others new ones are made beside them,
and going back to the first circumstances finds the first ones again.
"""

import datetime
from typing import NamedTuple


class Circumstances(NamedTuple):
    """Under which rows are prepared."""

    rendered_at: datetime.date  # the day that templates take for today
    row_timeout: float  # seconds
    row_memory_mb: int

    def suffix(self, read_clock: bool, watched: bool) -> str:
        """Returns what the name of a shard or a manifest ends with.

        Args:
            read_clock: whether rendering asked for the date.
            watched: whether the watchdog ended the preparation of a row.
        """
        date = f"-{self.rendered_at.isoformat()}" if read_clock else ""
        limits = f"-{self.row_timeout:g}s-{self.row_memory_mb}mb" if watched else ""
        return f"{date}{limits}"

    def suffixes(self) -> list[str]:
        """Returns the suffixes of what holds under these circumstances."""
        return [self.suffix(clock, watched) for watched in (True, False) for clock in (False, True)]

    @property
    def now(self) -> datetime.datetime:
        """The moment at which templates think that they are rendered: the first of the day, the same on every host."""
        return datetime.datetime.combine(self.rendered_at, datetime.time.min)
