"""The outcomes of checks, for people as a table that grows, and for programs as a dict."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from sft_jax.checking.checks import STATEMENTS
from sft_jax.checking.outcome import Outcome
from sft_jax.checking.subject import Subject
from sft_jax.evaluation.tables import EvaluationProgress

_STYLES = {"holds": "green", "FAILS": "bold red", "not checked": "yellow"}


class Table(contextlib.AbstractContextManager):
    """Prints a line when a contract has been checked, and says which one is being checked now."""

    def __init__(self, subject: Subject, shown: bool, contracts: int):
        """`contracts` are to be checked; where not `shown` there is only the bar."""
        self._shown, self._total, self._checked = shown, contracts, 0
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._bar: EvaluationProgress | None = None
        self._failed = self._unchecked = 0
        if shown:
            self._console.print(heading(subject) + "\n")

    def __exit__(self, *error) -> None:
        self._end_bar()
        if self._shown and error == (None, None, None):
            self._console.print("\n" + summary(self._failed, self._unchecked))

    def begin(self, name: str) -> None:
        """Says what is being checked, where standard error is a terminal."""
        self._bar = EvaluationProgress()
        self._bar(f"contracts: {name}", self._checked, self._total)

    def _end_bar(self) -> None:
        """Takes the bar away, so that a line of the table can be printed on the same terminal."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def add(self, outcome: Outcome) -> None:
        self._end_bar()
        self._checked += 1
        self._failed += outcome.state == "FAILS"
        self._unchecked += outcome.state == "not checked"
        if self._shown:
            self._console.print(line(outcome))


def heading(subject: Subject) -> str:
    """Returns what is checked, and on what."""
    spec, mesh, batch = subject.composed.abstract.spec, subject.mesh, subject.batch
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    documents = sum(int(row.max()) for row in batch.segments)
    return (
        f"{subject.run.model.path}: {len(spec.layers)} layers, hidden size {spec.hidden_size}, on {axes} ({mesh.devices.flat[0].platform}), "
        f"in float32; {len(batch.tokens)} rows of {batch.tokens.shape[1]} tokens with {documents} documents."
    )


def line(outcome: Outcome) -> Text:
    """Returns an outcome as a line, with a second one for a hint."""
    text = Text(f"{outcome.contract:13}")
    text.append(f"{outcome.state:12}", _STYLES[outcome.state])
    if outcome.not_checked:
        return text.append(outcome.not_checked)
    text.append(f"{_number(outcome.error):>9} of {_number(outcome.tolerance):<7} {outcome.seconds:6.1f} s  {outcome.quantity}")
    if outcome.state == "FAILS":
        text.append(f"\n{'':13}{outcome.hint or _first_sentence(STATEMENTS[outcome.contract])}")
    return text


def summary(failed: int, unchecked: int) -> str:
    """Returns what to make of the table."""
    end = f"; {unchecked} could not be checked here" if unchecked else ""
    if failed:
        return f"{failed} of the contracts do not hold{end}. Do not trust a run of this configuration before that is understood."
    return f"All contracts that could be checked hold{end}."


def to_dict(subject: Subject, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the outcomes for `--json`."""
    states = [outcome.state for outcome in outcomes]
    return {
        "model": subject.run.model.path,
        "mesh": dict(subject.mesh.shape),
        "platform": subject.mesh.devices.flat[0].platform,
        "rows": list(subject.batch.tokens.shape),
        "holds": "FAILS" not in states,
        "contracts": [outcome.to_dict() for outcome in outcomes],
    }


def _first_sentence(text: str) -> str:
    return text.split("\n")[0]


def _number(value: float) -> str:
    return f"{value:.3g}"
