"""Who takes part: models, and the ways in which they are prompted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sft_jax.comparison.systems import System
from sft_jax.errors import UserError

AUTO = "auto"  # a number of examples that is chosen on validation rows
CANDIDATES = (0, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Examples:
    """Examples in a prompt."""

    count: int | str  # or AUTO
    nearest: bool = False  # those most similar to what is asked; else the same ones for all, drawn by the seed


@dataclass(frozen=True)
class Contender:
    """A model, asked in one way."""

    model: str  # as the user named it
    system: System | None = None  # takes the place of a row's own system prompt
    examples: Examples | None = None

    def with_examples(self, count: int) -> "Contender":
        """Returns the contender with so many examples in place of AUTO."""
        return replace(self, examples=Examples(count, self.examples.nearest) if count else None)

    @property
    def name(self) -> str:
        """What it is called in tables."""
        parts = [self.model]
        if self.system is not None:
            parts.append(f"system {self.system.name}")
        if self.examples is not None:
            count = self.examples.count
            parts.append(f"{count} {'nearest ' if self.examples.nearest else ''}{'example' if count == 1 else 'examples'}")
        return ", ".join(parts)


def read_examples(shots: Sequence[str], retrieve: Sequence[str]) -> list[Examples]:
    """Returns what --shots and --retrieve ask for: each a number above 0, or "auto". Raises UserError."""
    found: list[Examples] = []
    for flag, values in (("--shots", shots), ("--retrieve", retrieve)):
        for value in values:
            if value != AUTO and not (value.isdecimal() and int(value)):
                raise UserError(
                    f"{flag}: must be a number of examples above 0, or {AUTO}, not '{value}'; the model without examples always takes part."
                )
            examples = Examples(AUTO if value == AUTO else int(value), flag == "--retrieve")
            if examples in found:
                raise UserError(f"{flag}: '{value}' is named twice; leave one of them out.")
            found.append(examples)
    return found


def make_contenders(
    models: Sequence[str], examples: Sequence[Examples] = (), systems: Sequence[System] = (), prompt_each: bool = False
) -> list[Contender]:
    """Returns all contenders: each model as it is, and the first one (or each) with every system prompt and number of examples.

    Raises UserError for a model that is named twice, and where there is nothing to compare.
    """
    contenders: list[Contender] = []
    for place, model in enumerate(models):
        if model in models[:place]:
            raise UserError(f"--model: {model} is named twice; leave one of them out.")
        prompted = prompt_each or place == 0
        for system in (None, *(systems if prompted else ())):
            contenders += [Contender(model, system, each) for each in (None, *(examples if prompted else ()))]
    if len(contenders) < 2:
        raise UserError("--model: one model in one way is nothing to compare; name another --model, or --shots, --retrieve or --system.")
    return contenders
