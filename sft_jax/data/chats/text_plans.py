"""What becomes of a row before it is tokenised: texts with weighted spans."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sft_jax.data.chats.locate import Region
from sft_jax.data.formats.conversation import Piece


class Span(NamedTuple):
    """Supervised characters. `turn` is the assistant turn that a prompt ends before, or -1 where none does.

    `pieces` lie in it and have weights of their own; a token belongs to the piece in which it begins.
    """

    start: int
    end: int
    weight: float
    turn: int
    pieces: tuple[Piece, ...] = ()

    @property
    def supervised(self) -> bool:
        """Whether any of its characters has a weight."""
        return self.end > self.start and (self.weight > 0 or any(piece.weight for piece in self.pieces))

    def with_pieces(self, pieces: Sequence[Piece]) -> "Span":
        """Returns the span with what lies in it of `pieces`."""
        inside = (Piece(max(start, self.start), min(end, self.end), weight) for start, end, weight in pieces)
        return self._replace(pieces=tuple(piece for piece in inside if piece.start < piece.end))


@dataclass(slots=True)
class TextPlan:
    """The text of one example."""

    text: str
    spans: list[Span]
    turn: int = -1
    starts: list[int] = field(default_factory=list)  # characters at which messages begin
    roles: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()  # content; the rest is the template's
    complete: bool = True  # all content lies in `regions`
    ends_with_eos: bool = False  # EOS is put after the tokens, supervised; and before them what inference puts there
    cut: int = -1  # character at which the text is tokenised in two parts
    neutral: str | None = None  # where not `complete`: a render with other contents, if the template accepts them


@dataclass(slots=True)
class RowPlan:
    """All texts of one row. `own` are those of turns that `main` does not show as they were written."""

    main: TextPlan | None
    own: list[TextPlan]
    kind: str
    counts: dict[str, int]
