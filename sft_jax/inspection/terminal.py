"""Examples and packed rows in a terminal: tokens coloured by their weight; without colours, what is trained on in marks.

Content never acts on the terminal: text is put together piece by piece, never read as markup, and control characters
are shown in escaped form.
"""

from typing import TextIO

import numpy as np
import rich.console
from rich.text import Text

from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.inspection.details import Detail
from sft_jax.inspection.fragments import fragments
from sft_jax.inspection.packed import PackedRow, Segment
from sft_jax.inspection.records import class_name
from sft_jax.printable import printable, split_unsafe

_STYLES = {"none": "dim", "less": "yellow", "one": "green", "more": "magenta"}
_UNSAFE_STYLE, _CONTROL_STYLE, _SPACE_STYLE = "reverse", "bold underline", "dim"
_SPACES = {" ": "·", "\t": "→\t", "\n": "↵\n"}


def weight_class(weight: float) -> str:
    """Returns the class of a weight, by which it is coloured: none, less (than 1), one, more."""
    return "none" if weight <= 0 else "less" if weight < 1 else "one" if weight == 1 else "more"


class TerminalView:
    """Prints to a terminal, or to a file or pipe, where `[[` and `]]` stand around what is trained on."""

    def __init__(self, tokenizer: Tokenizer, *, ids: bool = False, whitespace: bool = False, file: TextIO | None = None):
        """Prepares to print.

        Args:
            ids: show every token with its id instead of the text.
            whitespace: make spaces, tabs and newlines visible.
            file: where to, standard output by default.
        """
        self._tokenizer, self._ids, self._whitespace = tokenizer, ids, whitespace
        self._console = rich.console.Console(file=file, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._coloured = self._console.is_terminal and not self._console.no_color

    def legend(self) -> None:
        """Says how weights are shown, and what a weight is of."""
        text = Text("A token is marked where the model is trained to predict it from what stands before it.\n")
        if self._coloured:
            for name, meaning in (("none", "weight 0"), ("less", "below 1"), ("one", "1"), ("more", "above 1")):
                text.append(meaning, _STYLES[name]).append("   ")
            text.append("control token", _CONTROL_STYLE).append("   ").append(r"\x1b", _UNSAFE_STYLE)
            text.append(" a character that is not shown as it is")
        else:
            text.append("[[weight 1]]  [[0.5|another weight]]  the rest has weight 0")
        self._print(text)

    def example(self, detail: Detail) -> None:
        """Prints one example, or a row that cannot be used with the reason."""
        turn = f" · assistant turn {detail.turn}" if detail.turn >= 0 else ""
        facts = f"set {printable(detail.set)} · row {detail.row:,}{turn}"
        if len(detail.ids):
            supervised = int((detail.weights > 0).sum())
            facts += f" · {len(detail.ids):,} tokens, {supervised:,} supervised · {class_name(detail)}"
        self._print(Text("\n").append(printable(detail.where), "bold").append(f" · {facts}"))
        if detail.problem:
            self._print(Text(f"problem: {printable(detail.problem)}", "red"))
        if detail.note:
            self._print(Text(detail.note))
        if len(detail.ids):
            self._tokens(detail.ids, detail.weights)

    def row(self, row: PackedRow) -> None:
        """Prints one packed row, document by document."""
        head = Text("\n").append(f"packed row {row.number:,} of {row.of:,} of {printable(row.stream)}", "bold")
        head.append(
            f" · {len(row.segments)} document(s) · {row.used:,} of {row.length:,} positions used · "
            f"{row.supervised:,} supervised"
        )
        self._print(head)
        for number, segment in enumerate(row.segments, start=1):
            end = segment.start + len(segment.tokens) - 1
            turn = f" · assistant turn {segment.turn}" if segment.turn >= 0 else ""
            head = Text(f"── document {number} · positions {segment.start:,} to {end:,} · ", "cyan")
            self._print(head.append(printable(segment.where)).append(f" · set {printable(segment.set)}{turn}"))
            if self._ids:
                self._targets(segment)
            else:
                self._tokens(segment.ids, segment.id_weights)
        self._print(Text(f"── padding · {row.length - row.used:,} positions", "cyan"))

    def say(self, line: str) -> None:
        """Prints a line about what is shown."""
        self._print(Text(printable(line)))

    def _tokens(self, ids: np.ndarray, weights: np.ndarray) -> None:
        if self._ids:
            self._table(ids, weights)
            return
        text, marked = Text(), 0.0
        for fragment in fragments(self._tokenizer, ids, weights):
            if not self._coloured and fragment.weight != marked:
                text.append(_marks(marked, fragment.weight))
            marked = fragment.weight
            self._append(text, fragment.text, _style(fragment.weight, fragment.control))
        if not self._coloured:
            text.append(_marks(marked, 0.0))
        self._print(text)

    def _table(self, ids: np.ndarray, weights: np.ndarray) -> None:
        """Prints a line for every token: its place, id, weight and text."""
        self._print(Text(f"{'token':>6} {'id':>7} {'weight':>7}  text"))
        for fragment in fragments(self._tokenizer, ids, weights, each_token=True):
            line = Text(f"{fragment.start:>6} {ids[fragment.start]:>7} {fragment.weight:>7.4g}  ")
            self._print(self._append(line, repr(fragment.text)[1:-1], _style(fragment.weight, fragment.control)))

    def _targets(self, segment: Segment) -> None:
        """Prints a line for every position: the token that is read and the one that is to be predicted."""
        pieces = [
            (repr(fragment.text)[1:-1], fragment.control)
            for fragment in fragments(self._tokenizer, segment.ids, segment.id_weights, each_token=True)
        ]
        self._print(Text(f"{'position':>8} {'id':>7} {'target':>7} {'weight':>7}  token → target"))
        columns = zip(segment.tokens.tolist(), segment.targets.tolist(), segment.weights.tolist(), strict=True)
        for at, (token, target, weight) in enumerate(columns):
            line = Text(f"{segment.start + at:>8} {token:>7} {target:>7} {weight:>7.4g}  ")
            self._append(line, pieces[at][0], "").append(" → ")
            self._append(line, pieces[at + 1][0], _style(weight, pieces[at + 1][1]))
            self._print(line.append("" if weight else "  not trained", "dim"))

    def _append(self, text: Text, content: str, style: str) -> Text:
        for piece, unsafe in split_unsafe(content):
            if unsafe:
                text.append(piece, f"{style} {_UNSAFE_STYLE}")
            elif self._whitespace:
                for character in piece:
                    text.append(_SPACES.get(character, character), f"{style} {_SPACE_STYLE}" if character in _SPACES else style)
            else:
                text.append(piece, style)
        return text

    def _print(self, text: Text) -> None:
        self._console.print(text)


def _style(weight: float, control: bool) -> str:
    style = _STYLES[weight_class(weight)]
    return f"{style} {_CONTROL_STYLE}" if control else style


def _marks(before: float, weight: float) -> str:
    """Returns the marks between tokens of two weights."""
    opening = "" if weight <= 0 else "[[" if weight == 1 else f"[[{weight:.4g}|"
    return f"{']]' if before > 0 else ''}{opening}"
