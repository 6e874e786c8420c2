"""Circumstances: what a store may depend on beside its fingerprint, and whether it does is known only once it is made.

A template that reads the clock makes other tokens on another day, and a row that ran into a limit of the watchdog may
pass under a higher one. Most stores depend on neither and are used for ever. One that does carries the circumstances in
the name of its folder, so it is used again under the same ones only; under others a store of its own is made beside it,
and going back to the first ones finds the first store again.
"""

import datetime
from typing import NamedTuple


class Circumstances(NamedTuple):
    """Under which rows are prepared."""

    rendered_at: datetime.date  # the day that templates take for today
    row_timeout: float  # seconds
    row_memory_mb: int

    def folder_name(self, fingerprint: str, read_clock: bool, watched: bool) -> str:
        """Returns the name of a store.

        Args:
            fingerprint: see sft_jax.data.fingerprint.tokens_fingerprint.
            read_clock: whether rendering asked for the date.
            watched: whether the watchdog ended the preparation of a row.
        """
        date = f"-{self.rendered_at.isoformat()}" if read_clock else ""
        limits = f"-{self.row_timeout:g}s-{self.row_memory_mb}mb" if watched else ""
        return f"{fingerprint}{date}{limits}"

    def folder_names(self, fingerprint: str) -> list[str]:
        """Returns the names that a store which holds under these circumstances can have."""
        return [self.folder_name(fingerprint, clock, watched) for watched in (True, False) for clock in (False, True)]

    @property
    def now(self) -> datetime.datetime:
        """The moment at which templates think that they are rendered: the first of the day, the same on every host."""
        return datetime.datetime.combine(self.rendered_at, datetime.time.min)
