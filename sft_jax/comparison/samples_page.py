"""One self-contained page of a comparison: the numbers, and the answers side by side with filters for who wins."""

from collections.abc import Sequence

from sft_jax.comparison.results import Comparison
from sft_jax.comparison.tables import PAIR_HEAD, advice_lines, contender_rows, latency_line, pair_rows
from sft_jax.inspection.markup import escape
from sft_jax.inspection.page import Section, page
from sft_jax.inspection.page_numbers import table

MOST_ROWS = 1_000


def samples_page(comparison: Comparison) -> str:
    """Returns the page as HTML; nothing of the answers can act in it."""
    head, rows = contender_rows(comparison)
    numbers = table(head, rows, numbers=set(range(1, len(head))))
    pairs = []
    for scorer in comparison.scorers:
        rows, left_out = pair_rows(comparison, scorer)
        pairs.append(f"<h3>{escape(scorer)}</h3>{table(PAIR_HEAD, rows, numbers=set(range(2, len(PAIR_HEAD))))}")
        pairs += [f"<p>{left_out:,} pairs without the highest score are in results.json.</p>"] * bool(left_out)
    return page(
        "Contenders compared",
        [
            Section("contenders", "Contenders", numbers + _paragraphs(list(filter(None, [latency_line(comparison), *comparison.notes])))),
            Section("pairs", "Pairs", "".join(pairs)),
            Section("advice", "Advice", _paragraphs(advice_lines(comparison))),
            Section("answers", "Answers", _answers(comparison)),
        ],
    )


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _answers(comparison: Comparison) -> str:
    name = comparison.scorers[0]
    names = [each.contender.name for each in comparison.answered]
    values = [each.scored[name].of_each() for each in comparison.answered]
    shown = min(len(comparison.questions), MOST_ROWS)
    total = len(comparison.questions)
    what = f"The {shown:,} rows" if shown == total else f"The first {shown:,} of {total:,} rows (samples.jsonl has all)"
    pairs = [(one, other) for other in range(len(names)) for one in range(other)]
    articles = [_article(comparison, place, [of_each[place] for of_each in values], pairs) for place in range(shown)]
    return f"<p>{escape(f'{what}. Who wins is said by {name}.')}</p>{_form(names, pairs)}{''.join(articles)}"


def _form(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> str:
    groups = []
    for one, other in pairs:
        a, b = escape(names[one]), escape(names[other])
        kinds = ((f"better-{one}-{other}", f"{a} wins"), (f"better-{other}-{one}", f"{b} wins"), (f"equal-{one}-{other}", "as good"))
        options = "".join(f'<option value="{value}">{text}</option>' for value, text in kinds)
        groups.append(f'<optgroup label="{a} against {b}">{options}</optgroup>')
    return (
        '<form id="filters" role="search" hidden><input type="search" name="search" aria-label="Search in the answers" '
        'placeholder="Search in the answers below"><select name="only" aria-label="Who wins"><option value="">every row</option>'
        f'<option value="differ">not all as good</option>{"".join(groups)}</select><span id="status" role="status"></span></form>'
    )


def _article(comparison: Comparison, place: int, values: Sequence[float | None], pairs: Sequence[tuple[int, int]]) -> str:
    question = comparison.questions[place]
    kinds = ["differ"] if len(set(values)) > 1 else []
    for one, other in pairs:
        a, b = values[one], values[other]
        if a is not None and b is not None:
            kinds.append(f"equal-{one}-{other}" if a == b else f"better-{one}-{other}" if a > b else f"better-{other}-{one}")
    boxes = [_box("reference", "", comparison.answered[0].answers[place].reference)]
    for each, value in zip(comparison.answered, values, strict=True):
        facts = ["not counted" if value is None else f"{value:.4f}", f"{each.prompt_tokens[place]:,} + {each.answer_tokens[place]:,} tokens"]
        if not each.asked.fits[place]:
            facts.append("does not fit")
        elif not each.generations[place].finished:
            facts.append("cut off")
        facts += [f"after {', '.join(str(shot.where) for shot in each.asked.shown[place])}"] * bool(each.asked.shown[place])
        boxes.append(_box(each.contender.name, " · ".join(facts), each.answers[place].generation))
    return (
        f'<article class="example" data-is="{" ".join(kinds)}"><header><h3>{escape(str(question.where))}</h3></header>'
        f'<pre>{escape(question.asked)}</pre><div class="answers">{"".join(boxes)}</div></article>\n'
    )


def _box(heading: str, facts: str, text: str) -> str:
    return f'<div><p class="meta"><strong>{escape(heading)}</strong> {escape(facts)}</p><pre>{escape(text)}</pre></div>'
