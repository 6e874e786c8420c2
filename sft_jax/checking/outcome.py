"""What a check of a contract found."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """One measurement, or why there was none.

    `error` is how far apart the two ways are that must agree, `tolerance` how far they may be. NaN never holds.
    """

    contract: str
    quantity: str = ""  # what is furthest off
    error: float | None = None
    tolerance: float | None = None
    not_checked: str = ""  # why it could not be measured here; such an outcome neither holds nor fails
    hint: str = ""  # what to look at where it fails
    seconds: float = field(default=0.0, compare=False)

    @property
    def holds(self) -> bool:
        return not self.not_checked and self.error <= self.tolerance

    @property
    def state(self) -> str:
        return "not checked" if self.not_checked else "holds" if self.holds else "FAILS"

    def to_dict(self) -> dict[str, Any]:
        """Returns what `--json` shows."""
        values = {"contract": self.contract, "state": self.state.lower(), "seconds": round(self.seconds, 2)}
        if self.not_checked:
            return {**values, "reason": self.not_checked}
        return {**values, "quantity": self.quantity, "error": self.error, "tolerance": self.tolerance, **({"hint": self.hint} if self.hint else {})}
