"""Faults that only show beside other rows: each check is fed the facts of row after row, and tells at the end.

What is kept of a row is counted in bytes, so that a million rows take little memory.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from sft_jax.doctor.collection import Collection
from sft_jax.doctor.facts import Facts
from sft_jax.doctor.json_forms import FORMS
from sft_jax.doctor.personal_data import snippet

Report = Callable[[str, int, str], None]  # kind, row, detail


class SetCheck(Protocol):
    """A check of whole sets. `add` is called with every row that can be read, in order; `finish` reports what it found."""

    def __init__(self, rows: Collection): ...

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        """Takes note of a row."""

    def finish(self, report: Report) -> None:
        """Reports the faults of all rows."""


def first_of_equals(keys: np.ndarray) -> np.ndarray:
    """Returns for each place the first place with the same key, int64 [n]; a key of 0 equals nothing."""
    order = np.argsort(keys, kind="stable")
    begins = np.concatenate([[True], keys[order][1:] != keys[order][:-1]]) if len(keys) else np.zeros(0, bool)
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1] if len(keys) else 0
    return np.where(keys == 0, np.arange(len(keys)), first)


class Duplicates:
    """Rows of a split that are the same, and short rows whose words are: those after the first. 16 bytes a row."""

    def __init__(self, rows: Collection):
        self._rows = rows
        self._whole, self._short = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        self._whole[row], self._short[row] = facts.whole, facts.short

    def finish(self, report: Report) -> None:
        for begin, end in split_ranges(self._rows, ("train", "eval")):
            exact, near = first_of_equals(self._whole[begin:end]), first_of_equals(self._short[begin:end])
            for place in np.flatnonzero(exact != np.arange(end - begin)).tolist():
                report("duplicate", begin + place, f"is the same as {self._rows.where(begin + int(exact[place]))}")
            for place in np.flatnonzero((near != np.arange(end - begin)) & (exact == np.arange(end - begin))).tolist():
                report("near_duplicate", begin + place, f"has the same words as {self._rows.where(begin + int(near[place]))}")


class Conflicts:
    """Rows of a split with the same prompt, system prompt included, and another answer. 16 bytes a row."""

    def __init__(self, rows: Collection):
        self._rows = rows
        self._prompts, self._answers = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        self._prompts[row], self._answers[row] = facts.prompt, facts.answer

    def finish(self, report: Report) -> None:
        for begin, end in split_ranges(self._rows, ("train", "eval")):
            answers = self._answers[begin:end]
            first = first_of_equals(self._prompts[begin:end])
            for place in np.flatnonzero(answers[first] != answers).tolist():
                here, there = self._rows.texts(begin + place), self._rows.texts(begin + int(first[place]))
                report(
                    "conflicting_answers", begin + place,
                    f"answers {snippet(here.answer, 40)}, "
                    f"and {self._rows.where(begin + int(first[place]))} the same prompt with {snippet(there.answer, 40)}",
                )  # fmt: skip


class InvalidJson:
    """Answers that are no JSON, in a set where nearly all are objects or arrays. 2 bytes a row.

    The last answers of rows are a set, and those before them another: of a form that is asked for first, or of none.
    """

    USUAL = 0.8

    def __init__(self, rows: Collection):
        self._rows, self._forms = rows, np.zeros((2, len(rows)), np.uint8)  # places in FORMS, of last answers and of others

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        self._forms[:, row] = [FORMS.index(form) for form in facts.json]

    def finish(self, report: Report) -> None:
        bare, fenced, none = (FORMS.index(form) for form in ("object", "fenced", "none"))
        for begin, end in set_ranges(self._rows):
            for forms, what in zip(self._forms[:, begin:end], ("", "an earlier answer is none, "), strict=True):
                known = forms[forms > 0]
                share = np.mean((known == bare) | (known == fenced)) if len(known) else 0.0
                if share < self.USUAL:
                    continue
                wrong = forms == none
                if np.mean(known == bare) >= self.USUAL:  # a code block is no JSON for what reads the others
                    wrong |= forms == fenced
                for place in np.flatnonzero(wrong).tolist():
                    answer = self._rows.texts(begin + place).answer
                    shown = what or f"{snippet(answer)}, "
                    report("invalid_json", begin + place, f"{shown}where {100 * share:.1f}% of the set are JSON")


class OpenEndings:
    """Last answers whose last sentence has no mark at its end, in a set where nearly all have one. 1 byte a row."""

    USUAL, LEAST = 0.9, 20  # share of rows that end with a mark, and rows, below which nothing is said

    def __init__(self, rows: Collection):
        self._rows, self._state = rows, np.zeros(len(rows), np.uint8)  # 1: with a mark, 2: without

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        if facts.open_ending is not None:
            self._state[row] = 2 if facts.open_ending else 1

    def finish(self, report: Report) -> None:
        for begin, end in set_ranges(self._rows):
            state = self._state[begin:end]
            share = np.mean(state[state > 0] == 1) if state.any() else 0.0
            if share >= self.USUAL and np.sum(state > 0) >= self.LEAST:
                for place in np.flatnonzero(state == 2).tolist():
                    answer = self._rows.texts(begin + place).answer
                    report(
                        "cut_answer", begin + place,
                        f"ends with {snippet(answer, end=True)} without a mark, which {100 * share:.1f}% of the set have",
                    )  # fmt: skip


class WrongLanguage:
    """Answers in a language that hardly a row of their set has, where the prompt speaks of none. 3 bytes a row.

    A set may have several languages; each has many rows then.
    """

    OWN, MANY = 0.02, 10  # share and count of rows above which a language is one of the set
    USUAL, LEAST = 0.9, 10  # share of rows in the languages of the set, and rows, below which nothing is said
    WORDS = 15  # of an answer, below which the language counts for the set only

    def __init__(self, rows: Collection):
        self._rows = rows
        self._numbers: dict[str, int] = {"": 0}
        self._language = np.zeros(len(rows), np.uint8)
        self._exempt, self._long = np.zeros(len(rows), bool), np.zeros(len(rows), bool)

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        self._language[row] = self._numbers.setdefault(facts.language, len(self._numbers))
        self._exempt[row], self._long[row] = facts.any_language, facts.language_words >= self.WORDS

    def finish(self, report: Report) -> None:
        names = list(self._numbers)
        for begin, end in set_ranges(self._rows):
            language = np.where(self._exempt[begin:end], 0, self._language[begin:end])
            counts = np.bincount(language, minlength=len(names))
            counts[0] = 0  # not known
            known = int(counts.sum())
            own = (counts >= self.MANY) & (counts >= self.OWN * known)
            if known < self.LEAST or counts[own].sum() < self.USUAL * known:
                continue
            own_names = " and ".join(f"'{names[number]}'" for number in np.argsort(-counts, kind="stable") if own[number])
            for place in np.flatnonzero(~own[language] & (language != 0) & self._long[begin:end]).tolist():
                texts = self._rows.texts(begin + place)
                report(
                    "wrong_language", begin + place,
                    f"is in '{names[language[place]]}', the set in {own_names}: {snippet(texts.answer or texts.body)}",
                )  # fmt: skip


class LengthOutliers:
    """Rows far longer than their set: by six robust deviations of the logarithm, and ten times the median. 8 bytes a row."""

    DEVIATIONS, TIMES, LEAST = 6.0, 10.0, 20

    def __init__(self, rows: Collection):
        self._rows, self._characters = rows, np.zeros(len(rows), np.int64)

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        self._characters[row] = facts.characters

    def finish(self, report: Report) -> None:
        for begin, end in set_ranges(self._rows):
            characters = self._characters[begin:end]
            lengths = np.log(characters[characters > 0])
            if len(lengths) < self.LEAST:
                continue
            middle = np.median(lengths)
            deviation = 1.4826 * np.median(np.abs(lengths - middle))  # that of a normal distribution
            limit = np.exp(middle + max(self.DEVIATIONS * deviation, np.log(self.TIMES)))
            for place in np.flatnonzero(characters > limit).tolist():
                report(
                    "length_outlier", begin + place,
                    f"{characters[place]:,} characters, where the median of the set is {np.exp(middle):,.0f}",
                )  # fmt: skip


def set_ranges(rows: Collection) -> list[tuple[int, int]]:
    """Returns the first row of every data set and the one after its last; not of benchmarks."""
    return [
        (int(rows.bases[number]), int(rows.bases[number + 1]))
        for number, item in enumerate(rows.sets)
        if item.split != "benchmark"
    ]


def split_ranges(rows: Collection, splits: tuple[str, ...]) -> list[tuple[int, int]]:
    """Returns the same of whole splits, whose sets follow each other."""
    result = []
    for split in splits:
        numbers = [number for number, item in enumerate(rows.sets) if item.split == split]
        if numbers:
            result.append((int(rows.bases[numbers[0]]), int(rows.bases[numbers[-1] + 1])))
    return result
