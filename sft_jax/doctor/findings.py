"""What checks find: a bounded list a kind, exact counts beside it, and what is allowed of each."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sft_jax.errors import UserError, did_you_mean

Severity = Literal["error", "warning", "note"]
LISTED = 100  # findings of a kind that people are shown; all are counted
LISTED_IN_JSON = 100_000  # that programs are given


class Finding(NamedTuple):
    """One fault of one row."""

    file: str
    line: int
    set: str  # such as "data.train.code"
    detail: str


class KindResult(NamedTuple):
    """What a check found in all rows."""

    severity: Severity
    about: str
    rows: int  # that have the fault
    findings: tuple[Finding, ...]  # of the first of them
    usual: tuple[str, ...] = ()  # sets that are like this in most rows, so that it is none of their faults


@dataclass(frozen=True)
class Diagnosis:
    """The result of a doctor's look at data sets."""

    sets: dict[str, int]  # data set -> its rows
    kinds: dict[str, KindResult]
    diversity: dict[str, Any]
    notes: tuple[str, ...] = ()  # what was not looked at, and why

    @property
    def findings(self) -> dict[str, tuple[Finding, ...]]:
        """Returns kind -> its first findings."""
        return {kind: result.findings for kind, result in self.kinds.items()}

    @property
    def rows(self) -> int:
        """Returns the rows that were looked at for faults."""
        return sum(self.sets.values())

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain lists and dicts."""
        kinds = {
            kind: {
                "severity": result.severity, "about": result.about, "rows": result.rows, "usual_in": list(result.usual),
                "findings": [finding._asdict() for finding in result.findings],
                "not_listed": result.rows - len(result.findings),
            }
            for kind, result in self.kinds.items()
        }  # fmt: skip
        return {"sets": self.sets, "kinds": kinds, "diversity": self.diversity, "notes": list(self.notes)}


class Allowed(NamedTuple):
    """How many rows may have a fault: a count, or a share of all rows."""

    count: int = 0
    share: float | None = None

    def exceeded(self, found: int, rows: int) -> bool:
        """Returns whether `found` of `rows` rows are too many."""
        return found > (self.count if self.share is None else self.share * rows)

    def __str__(self) -> str:
        return str(self.count) if self.share is None else f"{100 * self.share:g}%"


@dataclass(frozen=True)
class Limits:
    """What is allowed: of every kind that is an error, and of kinds by name, whatever their severity and however usual."""

    errors: Allowed = Allowed()
    kinds: dict[str, Allowed] = field(default_factory=dict)

    def exceeded(self, diagnosis: Diagnosis) -> list[str]:
        """Returns the kinds of which more was found than is allowed."""
        result = []
        for kind, found in diagnosis.kinds.items():
            allowed = self.kinds.get(kind, self.errors if found.severity == "error" else None)
            if allowed is not None and allowed.exceeded(found.rows, diagnosis.rows):
                result.append(kind)
        return result


def parse_limits(text: str, known: tuple[str, ...]) -> Limits:
    """Reads limits such as "0", "1%" (of every kind that is an error) or "0.5%,refusal=20" (and of kinds by name).

    Args:
        text: of the flag `--allow`.
        known: all kinds.

    Raises UserError.
    """
    errors, kinds = None, {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        allowed = _allowed(value, part)
        if not equals:
            if errors is not None:
                raise UserError(f"--allow: '{text}' gives two limits without a name; write one, and others as KIND=LIMIT.")
            errors = allowed
        elif name not in known:
            raise UserError(f"--allow: unknown kind '{name}'; {did_you_mean(name, known)}.")
        elif name in kinds:
            raise UserError(f"--allow: names '{name}' twice; keep one of them.")
        else:
            kinds[name] = allowed
    return Limits(errors or Allowed(), kinds)


def _allowed(value: str, part: str) -> Allowed:
    if re.fullmatch(r"[0-9]{1,12}", value):
        return Allowed(int(value))
    if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?%", value) and float(value[:-1]) <= 100:
        return Allowed(share=float(value[:-1]) / 100)
    raise UserError(f"--allow: '{part}' is no limit; give rows or a share of them, such as 10, 0.5% or refusal=1%.")
