"""The part of the page that shows answers: the first and the last to each prompt, side by side."""

from collections.abc import Iterable

from sft_jax.inspection.page_numbers import table
from sft_jax.training.metrics import Record

MOST_SAMPLES = 50  # prompts that are shown
_MOST_CHARACTERS = 2_000  # of a text
_NO_SCORES = ("step", "set", "example", "prompt", "reference", "generation", "finished")


def samples_section(samples: Iterable[Record]) -> str:
    """Returns prompts with their references and the first and the last answer, those first whose last answer scores least."""
    answers: dict[tuple, list[Record]] = {}
    for sample in samples:
        answers.setdefault((sample["set"], *row_of(sample)), []).append(sample)
    order = sorted(answers.items(), key=lambda item: _score(item[1][-1]))
    rows = []
    for (name, file, line, turn), given in order[:MOST_SAMPLES]:
        where = f"{file}:{line}" + (f" (turn {turn})" if turn >= 0 else "")
        last = given[-1]
        before = given[0]["generation"] if len(given) > 1 else ""
        rows.append([name, where, *map(_cut, (last["prompt"], last["reference"], before, last["generation"])), _scores(last)])
    more = f"<p>{MOST_SAMPLES} of {len(order):,} prompts, those with the lowest scores; samples.jsonl has all.</p>" if len(order) > MOST_SAMPLES else ""
    head = ("set", "row", "prompt", "reference", "first answer", "last answer", "scores of the last")
    return f'<h3>Side by side</h3>{more}<div class="samples">{table(head, rows, where=1, tall=True)}</div>'


def row_of(sample: Record) -> tuple[str, int, int]:
    """Returns the row of a prompt: file, line and turn."""
    return tuple(sample["example"][name] for name in ("file", "line", "turn"))


def values_of(sample: Record) -> dict[str, float]:
    """Returns the scores of an answer, by scorer."""
    return {name: value for name, value in sample.items() if name not in _NO_SCORES and isinstance(value, (int, float))}


def _score(sample: Record) -> float:
    return sum(values_of(sample).values())


def _scores(sample: Record) -> str:
    shown = [f"{name} {value:.4g}" for name, value in values_of(sample).items()]
    return ", ".join([*shown, *([] if sample.get("finished") else ["did not end"])])


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
