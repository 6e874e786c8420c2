"""The parts of the page that show examples and packed rows token by token."""

from collections.abc import Iterable

import numpy as np

from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.inspection.details import Detail, read_details
from sft_jax.inspection.filters import Filters, Selection, wanted_rows
from sft_jax.inspection.fragments import fragments
from sft_jax.inspection.markup import escape, tokens_html
from sft_jax.inspection.packed import PackedRow, read_row
from sft_jax.inspection.records import class_name
from sft_jax.inspection.subject import Subject

_EVAL_ROWS = 2  # of each held-out set
_LEGEND = (
    '<p class="legend"><span>weight 0</span><span class="w one">weight 1</span><span class="w less">below 1</span>'
    '<span class="w more">above 1</span><span class="control">control token</span>'
    r'<span><span class="unsafe">\x1b</span> a character that is not shown as it is</span></p>'
    "<p>A token is marked where the model is trained to predict it from what stands before it in its document.</p>"
)


def example_section(subject: Subject, filters: Filters, most: int) -> tuple[str, str]:
    """Returns the examples that filters let through, at most `most` (0 = all), and a line that says which they are."""
    details, what = _chosen(subject, filters, most)
    articles = "".join(_example(detail, subject.data.tokenizer) for detail in details)
    names = dict.fromkeys(item.name for item in subject.sets)
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
    kinds = (
        ("problem", "with a problem"), ("too-long", "too long for a row"), ("cut", "class cut"), ("per-turn", "class per-turn"),
        ("untrained", "nothing trained on"), ("beyond-cap", "beyond the cap of its set"),
    )  # fmt: skip
    only = "".join(f'<option value="{value}">{text}</option>' for value, text in kinds)
    form = (
        '<form id="filters" role="search" hidden><input type="search" name="search" aria-label="Search in the examples" '
        'placeholder="Search in the examples below"><select name="set" aria-label="Data set">'
        f'<option value="">every set</option>{options}</select>'
        f'<select name="only" aria-label="Kind"><option value="">every kind</option>{only}</select>'
        '<span id="status" role="status"></span></form>'
    )
    return f"<p>{escape(what)}</p>{_LEGEND}{form}{articles}", what


def row_section(subject: Subject, most: int) -> str:
    """Returns the first training rows, at most `most`, and a few of each held-out set."""
    train, tokenizer = subject.data.train, subject.data.tokenizer
    parts = []
    for name, stream, count in [
        ("train", train, most),
        *((name, stream, _EVAL_ROWS) for name, stream in subject.data.eval.items()),
    ]:
        shown = min(count, stream.total_rows)
        parts.append(f"<h3>{escape(name)}: the first {shown:,} of {stream.total_rows:,} rows, in order</h3>")
        parts += [_row(row, tokenizer) for row in _rows(stream, name, shown)]
    told = (
        "<p>Documents share a row and never see each other. At each position the model reads a token and is trained on the "
        "next one of its document, so the first token of a document is never a target.</p>"
    )
    return told + "".join(parts)


def _chosen(subject: Subject, filters: Filters, most: int) -> tuple[list[Detail], str]:
    if not most or filters != Filters():
        selection = Selection(subject, filters)
        details = list(selection.take(most))
        asked = f" that match {filters.describe()}" if filters.describe() else ""
        how_many = "all" if len(details) == selection.matched else f"the first {len(details):,} of"
        return details, f"The page holds {how_many} {selection.matched:,} examples{asked}."
    wanted = wanted_rows(subject, filters)
    total = sum(len(numbers) for _, numbers in wanted)
    if total <= most:
        details = list(read_details(subject, wanted))
        return details, f"The page holds all {len(details):,} examples of the {total:,} rows."
    spread = [(item, _spread(numbers, max(1, most * len(numbers) // total))) for item, numbers in wanted]
    details = list(read_details(subject, spread))
    rows = sum(len(numbers) for _, numbers in spread)
    return (
        details,
        f"The page holds {len(details):,} examples: those of {rows:,} of all {total:,} rows, evenly spread over each set.",
    )


def _spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` of the numbers at even distances, the first among them."""
    return numbers[np.arange(count) * len(numbers) // count]


def _example(detail: Detail, tokenizer: Tokenizer) -> str:
    marks = [("problem", detail.problem), ("too-long", detail.shortened), ("untrained", not detail.trained), ("beyond-cap", detail.note)]
    kinds = [class_name(detail), *(name for name, holds in marks if holds)]
    turn = f" · assistant turn {detail.turn}" if detail.turn >= 0 else ""
    facts = f"set {detail.set} · row {detail.row:,}{turn}"
    body = f'<p class="problem">{escape(detail.problem)}</p>' if detail.problem else ""
    body += f'<p class="note">{escape(detail.note)}</p>' if detail.note else ""
    if len(detail.ids):
        facts += f" · {len(detail.ids):,} tokens, {int((detail.weights > 0).sum()):,} supervised · {class_name(detail)}"
        body += _tokens(tokenizer, detail.ids, detail.weights)
    return (
        f'<article class="example" data-set="{escape(detail.set)}" data-is="{" ".join(filter(None, kinds))}">'
        f'<header><h3>{escape(detail.where)}</h3><span class="meta">{escape(facts)}</span></header>{body}</article>\n'
    )


def _row(row: PackedRow, tokenizer: Tokenizer) -> str:
    strip = "".join(f'<i style="flex:{len(segment.tokens)}"></i>' for segment in row.segments)
    padding = row.length - row.used
    documents = []
    for number, segment in enumerate(row.segments, start=1):
        turn = f" · assistant turn {segment.turn}" if segment.turn >= 0 else ""
        end = segment.start + len(segment.tokens) - 1
        facts = f"document {number} · positions {segment.start:,} to {end:,} · {segment.where} · set {segment.set}{turn}"
        documents.append(
            f'<div class="document"><p class="meta">{escape(facts)}</p>'
            f"{_tokens(tokenizer, segment.ids, segment.id_weights)}</div>"
        )
    facts = (
        f"{len(row.segments)} document(s) · {row.used:,} of {row.length:,} positions, {padding:,} padding · "
        f"{row.supervised:,} supervised"
    )
    return (
        f'<article><header><h3>packed row {row.number:,}</h3><span class="meta">{facts}</span></header>'
        f'<div class="strip" role="img" aria-label="documents along the row">{strip}<span style="flex:{padding}"></span></div>'
        f"{''.join(documents)}</article>\n"
    )


def _rows(stream: RowStream, name: str, count: int) -> Iterable[PackedRow]:
    return (read_row(stream, name, number) for number in range(count))


def _tokens(tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray) -> str:
    """Returns the text of tokens by weight, and on request the ids."""
    pieces = fragments(tokenizer, ids, weights)
    lines = "\n".join(f"{piece.weight:.4g}: {' '.join(map(str, ids[piece.start : piece.stop].tolist()))}" for piece in pieces)
    return f"<pre>{tokens_html(pieces)}</pre><details><summary>ids by weight</summary><pre>{lines}</pre></details>"
