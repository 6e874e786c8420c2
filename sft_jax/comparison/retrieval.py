"""The most similar of many texts: TF-IDF of words and pairs of words, compared by their cosine.

Letters: N texts, E entries (distinct words and pairs of a text, over all texts).
"""

from collections.abc import Sequence

import numpy as np

from sft_jax.doctor.texts import hash_runs, hash_words, words


class TextIndex:
    """Texts among which similar ones are looked for."""

    def __init__(self, texts: Sequence[str]):
        """Counts the words and pairs of words of the texts; they are told apart by 64-bit hashes."""
        found = [_terms(text) for text in texts]
        self.size = len(texts)
        sizes = [len(terms) for terms, _ in found]
        terms = np.concatenate([np.zeros(0, np.uint64), *(terms for terms, _ in found)])
        counts = np.concatenate([np.zeros(0), *(counts for _, counts in found)])
        order = np.argsort(terms, kind="stable")
        self._texts = np.repeat(np.arange(self.size), sizes)[order]  # [E], by term
        self._terms, self._starts, documents = np.unique(terms[order], return_index=True, return_counts=True)
        self._starts = np.append(self._starts, len(terms))
        self._rarity = np.log((1 + self.size) / (1 + documents)) + 1  # smoothed, so that no term weighs nothing
        weights = (1 + np.log(counts[order])) * np.repeat(self._rarity, documents)
        lengths = np.sqrt(np.bincount(self._texts, weights**2, minlength=self.size))
        self._weights = weights / lengths[self._texts]  # [E]

    def nearest(self, text: str, count: int) -> list[int]:
        """Returns the `count` texts (all where there are fewer) most similar to `text`, the most similar first.

        Of equally similar ones the first come first.
        """
        return np.argsort(-self.similarities(text), kind="stable")[:count].tolist()

    def similarities(self, text: str) -> np.ndarray:
        """Returns the cosine of `text` with each text, float64 [N]; 0 where they share no word."""
        terms, counts = _terms(text)
        places = np.searchsorted(self._terms, terms)
        known = places < len(self._terms)
        known[known] = self._terms[places[known]] == terms[known]
        unseen = np.log(1 + self.size) + 1  # the rarity of a term that no text has
        weights = (1 + np.log(counts)) * np.where(known, self._rarity[np.where(known, places, 0)] if len(self._terms) else unseen, unseen)
        result = np.zeros(self.size)
        for place, weight in zip(places[known].tolist(), weights[known].tolist(), strict=True):
            entries = slice(self._starts[place], self._starts[place + 1])
            result[self._texts[entries]] += weight * self._weights[entries]
        return result / (np.sqrt(np.sum(weights**2)) or 1.0)


def _terms(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of the words and pairs of words of a text, and how often each is there."""
    hashes = hash_words(words(text))
    terms, counts = np.unique(np.concatenate([hash_runs(hashes, 1), hash_runs(hashes, 2)]), return_counts=True)
    return terms, counts.astype(np.float64)
