"""What follows from the numbers of a comparison, as sentences that state their rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sft_jax.comparison.paired import ALPHA, POWER, Pair, rows_needed


@dataclass(frozen=True)
class Entry:
    """A contender, as advice sees it."""

    name: str
    score: float
    cost: float  # of 1,000 requests: money where `Terms.priced`, else tokens
    prompted: bool  # it is the first model, however it is asked; the others are its rivals


@dataclass(frozen=True)
class Terms:
    """What the numbers are of."""

    scorer: str
    rows: int
    priced: bool


@dataclass(frozen=True)
class Judged:
    """A pair with its p-value after correction for all pairs."""

    pair: Pair
    p: float

    @property
    def significant(self) -> bool:
        return self.p < ALPHA

    def swapped(self) -> "Judged":
        """Returns the second against the first."""
        pair, ends = self.pair, self.pair.interval
        ends = None if ends is None else type(ends)(-ends.high, -ends.low)
        return Judged(Pair(-pair.difference, ends, pair.p, pair.exact, pair.losses, pair.wins, pair.ties, pair.spread, pair.answers), self.p)


@dataclass(frozen=True)
class Advice:
    """Which contender to take, and why."""

    verdict: Literal["best", "cheapest", "cannot tell"]
    choice: str  # name of a contender; with "cannot tell" the cheapest
    rows_needed: int | None  # with "cannot tell"; None where no difference is seen
    sentences: tuple[str, ...]


def advise(entries: Sequence[Entry], against: Callable[[int, int], Judged], pairs: int, terms: Terms) -> Advice:
    """Returns the advice of a rule: the cheapest contender whose score is not significantly below the highest.

    Where nothing is significantly below the highest, nothing can be told, and how many rows could tell is said instead.

    Args:
        entries: at least two, with scores that are numbers.
        against: places of two entries -> the first against the second.
        pairs: how many pairs p-values were corrected for.
    """
    best = max(range(len(entries)), key=lambda n: (entries[n].score, -entries[n].cost))
    others = [n for n in range(len(entries)) if n != best]
    below = [n for n in others if against(best, n).significant and against(best, n).pair.difference > 0]
    level = [best, *(n for n in others if n not in below)]
    choice = min(level, key=lambda n: (entries[n].cost, -entries[n].score))
    second = max(others, key=lambda n: entries[n].score)
    needed = None
    if not below:
        rival = choice if choice != best else second
        verdict, told, needed = "cannot tell", *_cannot_tell(entries, best, choice, rival, against(best, rival), pairs, terms)
    elif choice == best:
        verdict = "best"
        if second in level:
            told = f"Take {_scored(entries[best], terms)}. It has the highest score and is the cheapest of those not significantly below it."
        else:
            told = (
                f"Take {_scored(entries[best], terms)}. It is significantly above every other; next is {entries[second].name}: "
                f"{_difference(against(best, second))}."
            )
    else:
        verdict = "cheapest"
        judged = against(best, choice)
        told = (
            f"Take {_scored(entries[choice], terms)}. {entries[best].name} has the highest score ({entries[best].score:.4f}) and costs "
            f"{_times(entries[best].cost, entries[choice].cost)}, and the difference is not significant: {_difference(judged)}."
        )
    sentences = [told, *_prompting(entries, against), _rule(pairs, terms), _unknown(entries, choice, best, against, terms)]
    return Advice(verdict, entries[choice].name, needed, tuple(sentences))


def _cannot_tell(entries, best: int, choice: int, rival: int, judged: Judged, pairs: int, terms: Terms) -> tuple[str, int | None]:
    needed = rows_needed(judged.pair.difference, judged.pair.spread, pairs)
    cheapest = f"Until then the cheapest is {_scored(entries[choice], terms)}."
    if needed is None:
        return f"These {terms.rows:,} rows cannot tell: {entries[best].name} and {entries[rival].name} score the same. {cheapest}", None
    return (
        f"These {terms.rows:,} rows cannot tell: {entries[best].name} has the highest score ({entries[best].score:.4f}), and nothing is "
        f"significantly below it. To show the difference that is seen from {entries[rival].name}, {_difference(judged)}, would take about "
        f"{needed:,} rows ({POWER:.0%} power). {cheapest}"
    ), needed


def _prompting(entries: Sequence[Entry], against: Callable[[int, int], Judged]) -> list[str]:
    """Returns a sentence on the first model, prompted as well as it can be, against the other models; none where there are none."""
    groups = [[n for n, entry in enumerate(entries) if entry.prompted == prompted] for prompted in (True, False)]
    if not all(groups):
        return []
    prompted, other = (max(group, key=lambda n: entries[n].score) for group in groups)
    judged = against(other, prompted)
    return [
        f"Prompting against another model: the first model reaches {entries[prompted].score:.4f} at best ({entries[prompted].name}), the "
        f"others {entries[other].score:.4f} ({entries[other].name}): {_difference(judged)}, which is "
        f"{'' if judged.significant else 'not '}significant."
    ]


def _rule(pairs: int, terms: Terms) -> str:
    return (
        f"Rule: the cheapest ({'price' if terms.priced else 'tokens'} of a request) of the contenders whose {terms.scorer} is not significantly "
        f"below the highest, by paired permutation tests on the same {terms.rows:,} rows, Holm-corrected for {pairs:,} "
        f"{'pair' if pairs == 1 else 'pairs'}, alpha {ALPHA:g}."
    )


def _unknown(entries, choice: int, best: int, against, terms: Terms) -> str:
    parts = []
    if choice != best and against(best, choice).pair.interval is not None:
        most = max(against(best, choice).pair.interval.high, 0)
        parts.append(f"{entries[choice].name} may be below {entries[best].name} by up to {most:.4f} (95 %)")
    if not terms.priced:
        parts.append("no price was given, and a token of one model may cost more than one of another")
    parts.append("what fine-tuning and hosting cost, requests unlike the held-out rows, and whatever the scorer does not look at")
    return f"Not known from this: {'; '.join(parts)}."


def _scored(entry: Entry, terms: Terms) -> str:
    cost = f"{entry.cost:.4g} per 1,000 requests" if terms.priced else f"{entry.cost / 1000:,.1f} tokens a request"
    return f"{entry.name} ({terms.scorer} {entry.score:.4f}, {cost})"


def _times(cost: float, other: float) -> str:
    return f"{cost / other:.2g} times as much" if other > 0 else "more"


def _difference(judged: Judged) -> str:
    ends = judged.pair.interval
    between = "" if ends is None else f" [{ends.low:+.4f}, {ends.high:+.4f}]"
    return f"{judged.pair.difference:+.4f}{between}, {p_text(judged.p)}"


def p_text(p: float) -> str:
    """Returns a p-value for people.

    >>> p_text(0.04567), p_text(1e-9)
    ('p = 0.046', 'p < 0.0001')
    """
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
