"""Training rows that hold what a held-out set or a benchmark asks: runs of 13 words, or a whole prompt; of tokens the whole row.

Runs of 13 words are the measure of GPT-3's report (Brown et al. 2020, appendix C). Of texts that are shorter the whole counts.
"""

from collections import Counter

import numpy as np

from sft_jax.data.examples import RowError
from sft_jax.doctor.collection import Collection
from sft_jax.doctor.facts import Facts
from sft_jax.doctor.personal_data import mask
from sft_jax.doctor.set_checks import Report
from sft_jax.doctor.texts import hash_runs, hash_words, words

RUN = 13  # words
SHORT = range(8, RUN)  # words of a whole prompt that is looked for inside of other texts; a shorter one must be equal
NUMBERS = 4  # in a run, at most: one that is mostly arithmetic is nobody's sentence
COMMON = 10  # training rows with a run above which it is a phrase of everybody's; in small sets 1% of the rows, at least 2


def _runs_of(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the runs of a text that are not mostly numbers, from the hashes of its words: hashes, and first words."""
    numbers = np.concatenate([[0], np.cumsum(hashes & 1)])
    places = np.flatnonzero(numbers[RUN:] - numbers[:-RUN] <= NUMBERS)
    return hash_runs(hashes, RUN)[places], places


class Overlap:
    """Finds them. 16 bytes a word of held-out rows are kept, and 4 bytes a run that a training row shares."""

    def __init__(self, rows: Collection):
        self._rows = rows
        train = sum(len(item.rows) for item in rows.sets if item.split == "train")
        self._limit = max(2, min(COMMON, train // 100))
        self._held: list[tuple[int, np.ndarray]] = []  # row, hashes of its runs; until the first training row comes
        self._prompts: dict[int, int] = {}  # key of a held-out prompt -> row
        self._without_words: dict[int, int] = {}  # key of a held-out row of tokens, or of signs -> row
        self._rows_of: Counter[tuple[str, int]] = Counter()  # ("held" or "train", key of a held-out prompt) -> rows with it
        self._answered: set[tuple[int, int]] = set()  # keys of held-out prompts and their answers
        self._short = ShortTexts()  # held-out prompts
        self._train_short = ShortTexts()
        self._known = self._owners = np.zeros(0, np.uint64)  # hashes of held-out runs, sorted; the first row with each
        self._counts = np.zeros(0, np.uint32)  # training rows that have it
        self._hits: list[tuple[int, np.ndarray]] = []  # training row, places in `_known`
        self._same: list[tuple[int, int, int]] = []  # training row, keys of its prompt, which is held out, and of its answer
        self._whole: dict[int, tuple[int, str]] = {}  # training row -> held-out row, how they share a whole prompt

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        hashes = np.concatenate([facts.prompt_words, facts.answer_words])
        asked = facts.prompt_words if len(facts.prompt_words) else facts.answer_words
        if self._rows.sets[set_number].split == "train":
            if facts.whole in self._without_words:
                self._whole[row] = self._without_words[facts.whole], "is the same as"
            elif self._prompts:
                self._add_train(row, facts, asked, hashes)
        elif not len(hashes):
            self._without_words.setdefault(facts.whole, row)
        else:
            self._held.append((row, np.unique(_runs_of(hashes)[0])))
            self._prompts.setdefault(facts.asked, row)
            self._rows_of["held", facts.asked] += 1
            self._answered.add((facts.asked, facts.answer))
            self._short.add(row, asked)

    def _add_train(self, row: int, facts: Facts, asked: np.ndarray, hashes: np.ndarray) -> None:
        if self._held:
            self._make_index()
        if facts.asked in self._prompts:
            self._rows_of["train", facts.asked] += 1
            self._same.append((row, facts.asked, facts.answer))
        elif found := self._short.inside(hashes):
            self._whole[row] = found[0], "holds the whole prompt of"
        else:
            self._train_short.add(row, asked)
        _, places = self._find(np.unique(_runs_of(hashes)[0]))
        self._counts[places] += 1
        rare = places[self._counts[places] <= self._limit]
        if len(rare):
            self._hits.append((row, rare.astype(np.uint32)))

    def _find(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns which of some runs a held-out row has, and their places in the index."""
        if not len(self._known):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        places = np.searchsorted(self._known, runs).clip(max=len(self._known) - 1)
        found = np.flatnonzero(self._known[places] == runs)
        return found, places[found]

    def _make_index(self) -> None:
        hashes = np.concatenate([runs for _, runs in self._held])
        owners = np.repeat(np.asarray([row for row, _ in self._held], np.int32), [len(runs) for _, runs in self._held])
        self._held = []
        self._known, first = np.unique(hashes, return_index=True)
        self._owners = owners[first]
        self._counts = np.zeros(len(self._known), np.uint32)

    def finish(self, report: Report) -> None:
        for row, asked, answer in self._same:
            everybodys = self._rows_of["held", asked] > 1 and self._rows_of["train", asked] > self._limit  # "Tell me a joke."
            if not everybodys or (asked, answer) in self._answered:
                self._whole[row] = self._prompts[asked], "has the same prompt as"
        self._find_prompts_in_held_out()
        for row, (other, how) in sorted(self._whole.items()):
            report("overlap", row, f"{how} {self._rows.where(other)}")
        for row, places in self._hits:
            places = places[self._counts[places] <= self._limit]
            if row in self._whole or not len(places):
                continue
            owners, counts = np.unique(self._owners[places], return_counts=True)
            other = int(owners[counts.argmax()])
            mine = self._rows.texts(row).all
            text, size = self._shared(words(mine), words(self._rows.texts(other).all))
            if text:
                shown = f'"{text}"' if f" {text} " in f" {' '.join(words(mask(mine)))} " else "text with personal data"
                report("overlap", row, f"shares {shown} with {self._rows.where(other)} ({size} words)")

    def _find_prompts_in_held_out(self) -> None:
        """Looks for short prompts of training rows inside of held-out texts, which are read a second time."""
        for number, item in enumerate(self._rows.sets):
            if item.split == "train" or not self._train_short:
                continue
            for row in range(int(self._rows.bases[number]), int(self._rows.bases[number + 1])):
                try:
                    found = self._train_short.inside(hash_words(words(self._rows.texts(row).all)))
                except RowError:  # counted where it was first read
                    continue
                for train in found:
                    self._whole.setdefault(train, (row, "has a prompt that is part of"))

    def _shared(self, mine: list[str], yours: list[str]) -> tuple[str, int]:
        """Returns what a training row shares with a held-out one: the first run, and how many words in runs.

        Words that are also in a phrase of everybody's do not count: half a run of others is needed beside them.
        """
        theirs = {tuple(yours[place : place + RUN]) for place in range(len(yours) - RUN + 1)}
        runs, begins = _runs_of(hash_words(mine))
        found, places = self._find(runs)
        common = self._counts[places] > self._limit
        everybodys, shared = np.zeros(len(mine), bool), np.zeros(len(mine), bool)
        first = ""
        for begin, is_common in zip(begins[found].tolist(), common.tolist(), strict=True):
            run = mine[begin : begin + RUN]
            if is_common:
                everybodys[begin : begin + RUN] = True
            elif tuple(run) in theirs:
                shared[begin : begin + RUN] = True
                first = first or " ".join(run)
        return (first, int(shared.sum())) if (shared & ~everybodys).sum() > RUN // 2 else ("", 0)


class ShortTexts:
    """Texts of a few words, to be found inside of others."""

    def __init__(self):
        self._rows: dict[int, dict[int, list[int]]] = {}  # words -> hash -> rows

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, hashes: np.ndarray) -> None:
        """Takes note of a text, from the hashes of its words, if it is short but not too short."""
        if len(hashes) in SHORT:
            self._rows.setdefault(len(hashes), {}).setdefault(int(hash_runs(hashes, len(hashes))[0]), []).append(row)

    def inside(self, hashes: np.ndarray) -> list[int]:
        """Returns the rows whose text is part of one, of which the hashes of the words are given."""
        found = []
        for size, rows in sorted(self._rows.items()):
            for run in dict.fromkeys(hash_runs(hashes, size).tolist()):
                found += rows.get(run, ())
        return found
