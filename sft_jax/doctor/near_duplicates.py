"""Near duplicates among a million rows in bounded memory: MinHash, banded by sorting, verified on the texts themselves.

Signatures are datasketch's. Its index is not used: it keeps a Python set for every bucket, kilobytes a row. Here a band is
sorted, so that equal ones lie side by side, which takes 16 bytes a row for one band at a time, beside 320 of a signature.
"""

import functools

import numpy as np

from sft_jax.doctor.collection import Collection
from sft_jax.doctor.facts import PERMUTATIONS, SHINGLE, Facts
from sft_jax.doctor.set_checks import Report, first_of_equals, split_ranges
from sft_jax.doctor.texts import Texts, quantities, words

THRESHOLD = 0.8  # Jaccard similarity of the sets of shingles
SIDE = 0.5  # Jaccard similarity of the words of the prompts, and of those of the answers
_BANDS = 16  # of PERMUTATIONS / 16 = 5 each: 0.8 is met with probability 0.998, 0.5 with 0.40
_SLACK = 0.15  # by which an estimate may fall short of the similarity: 3.4 standard deviations at 0.8
_NEIGHBOURS = 4  # with which a row is compared in a band, beside the first of all that have the band
_BLOCK = 1 << 16  # pairs that are looked at in one go
_KEPT = 4096  # rows whose texts stay in memory


def candidate_pairs(signatures: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of rows that may be similar, (later, earlier), int64 [pairs] each, sorted.

    Args:
        signatures: uint32 [n, PERMUTATIONS].
        present: bool [n], the rows that are looked at.

    A row is compared with its neighbours in each band, not with all rows that share it, so that a phrase that everybody
    writes makes no square of pairs; rows that share further bands are neighbours.
    """
    rows = np.flatnonzero(present)
    found = np.zeros(0, np.int64)
    width = PERMUTATIONS // _BANDS
    following = hash_band(signatures, rows, 0, width)
    for band in range(_BANDS if len(rows) else 0):
        own, following = following, hash_band(signatures, rows, (band + 1) % _BANDS * width, width)
        order = np.lexsort((rows, following, own))
        key, places = own[order], rows[order]
        begins = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        heads = np.minimum.reduceat(places, begins)[np.searchsorted(begins, np.arange(len(key)), side="right") - 1]
        parts = [_alike(signatures, places, heads, heads != places, len(present))]
        for step in range(1, _NEIGHBOURS + 1):
            parts.append(_alike(signatures, places[step:], places[:-step], key[step:] == key[:-step], len(present)))
        found = np.union1d(found, np.concatenate(parts))
    return found // len(present), found % len(present)


def hash_band(signatures: np.ndarray, rows: np.ndarray, begin: int, width: int) -> np.ndarray:
    """Returns a hash of columns [begin, begin + width) of each row, uint64 [len(rows)]."""
    result = np.zeros(len(rows), np.uint64)
    for column in range(begin, begin + width):
        result = (result + signatures[rows, column]) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(29)
    return result


def _alike(signatures: np.ndarray, ones: np.ndarray, others: np.ndarray, use: np.ndarray, count: int) -> np.ndarray:
    """Returns the pairs whose signatures are similar enough, each as later * count + earlier."""
    ones, others = ones[use], others[use]
    kept = []
    for begin in range(0, len(ones), _BLOCK):
        one, other = ones[begin : begin + _BLOCK], others[begin : begin + _BLOCK]
        alike = (signatures[one] == signatures[other]).mean(1) >= THRESHOLD - _SLACK
        kept.append(np.maximum(one, other)[alike] * count + np.minimum(one, other)[alike])
    return np.concatenate(kept) if kept else np.zeros(0, np.int64)


def similarity(one: Texts, other: Texts) -> float:
    """Returns the Jaccard similarity of two rows; 0 where they are no near duplicates although most of their words are.

    They are none where a number or an operator differs, since that is another exercise; nor where only a long text is
    shared, and what is asked about it, or the answer, is another one; nor where system prompt, reasoning or tools are others.
    """
    mine, yours = words(one.all), words(other.all)
    value = jaccard(_shingles(mine), _shingles(yours))
    if value < THRESHOLD or quantities(one.all) != quantities(other.all):
        return 0.0
    mine, yours = words(one.apart), words(other.apart)
    shared = jaccard(_shingles(mine), _shingles(yours)) if min(len(mine), len(yours)) >= SHINGLE else float(mine == yours)
    if shared < THRESHOLD or quantities(one.apart) != quantities(other.apart):
        return 0.0
    for get in (lambda texts: texts.prompt, lambda texts: texts.answer):
        if one.answers and other.answers and jaccard(set(words(get(one))), set(words(get(other)))) < SIDE:
            return 0.0
    return value


def jaccard(one: set, other: set) -> float:
    """Returns the size of what two sets share over that of what either has; 1 where both are empty."""
    return len(one & other) / len(one | other) if one or other else 1.0


def _shingles(found: list[str]) -> set[tuple[str, ...]]:
    return {tuple(found[place : place + SHINGLE]) for place in range(len(found) - SHINGLE + 1)}


class NearDuplicates:
    """Rows that are nearly an earlier one of their split, and training rows that are nearly a held-out one. 329 bytes a row."""

    def __init__(self, rows: Collection):
        self._rows = rows
        self.signatures = np.zeros((len(rows), PERMUTATIONS), np.uint32)
        self.present = np.zeros(len(rows), bool)
        self._whole = np.zeros(len(rows), np.uint64)
        self._texts = functools.lru_cache(_KEPT)(rows.texts)

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        if facts.signature is not None:
            self.signatures[row], self.present[row], self._whole[row] = facts.signature, True, facts.whole

    def finish(self, report: Report) -> None:
        unlike = self.present.copy()  # what is the same is found by other means
        for begin, end in split_ranges(self._rows, ("train", "eval", "benchmark")):
            unlike[begin:end] &= first_of_equals(self._whole[begin:end]) == np.arange(end - begin)
        later, earlier = candidate_pairs(self.signatures, unlike)
        if not len(later):
            return
        first_of: dict[int, int] = {}  # near duplicate -> the row that is kept in its place
        rows, begins = np.unique(later, return_index=True)
        for row, partners in zip(rows.tolist(), np.split(earlier, begins[1:]), strict=True):
            split = self._rows.set_of(row).split
            leaked = repeated = False
            for partner in dict.fromkeys(first_of.get(one, one) for one in partners.tolist()):
                other = self._rows.set_of(partner).split
                held_out = split == "train" and other != "train"
                if (leaked if held_out else repeated) or not (held_out or other == split != "benchmark"):
                    continue
                alike = similarity(self._texts(row), self._texts(partner))
                if not alike:
                    continue
                place = f"{self._rows.where(partner)}, with a similarity of {alike:.2f}"
                if held_out:
                    leaked = True
                    report("overlap", row, f"is nearly {place}")
                else:
                    repeated = True
                    first_of[row] = partner
                    report("near_duplicate", row, f"is nearly {place}")
