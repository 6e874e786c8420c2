"""How much the training rows differ: distinct runs of words, similarity of pairs, clusters of prompts, shares of sets.

All but the shares is measured on a sample, the same for the same number of rows: the share of distinct runs falls as more
rows are counted, so it compares only between samples of one size.
"""

from typing import Any

import numpy as np

from sft_jax.data.randomness import derive_key, permutation, random_bits
from sft_jax.doctor.collection import Collection
from sft_jax.doctor.facts import Facts
from sft_jax.doctor.personal_data import snippet
from sft_jax.doctor.texts import hash_runs

SAMPLE = 5000  # rows
PAIRS = 1000  # rows whose pairs are compared
LONGEST = 2000  # words of a row that count
CLUSTERS = 20  # at most; one for each ten rows in small sets
_BUCKETS = 1024  # of hashed words
_ROUNDS = 25


class Diversity:
    """Measures them over the training rows, or where there are none over the held-out ones. 8 bytes a row, and a sample."""

    def __init__(self, rows: Collection):
        self._rows = rows
        splits = {item.split for item in rows.sets}
        self._split = "train" if "train" in splits else "eval"
        numbers = np.concatenate(
            [np.arange(rows.bases[n], rows.bases[n + 1]) for n, item in enumerate(rows.sets) if item.split == self._split]
        )
        chosen = numbers[permutation(derive_key("doctor", "sample"), len(numbers))[:SAMPLE]]
        self._sample: dict[int, Facts | None] = dict.fromkeys(sorted(chosen.tolist()))
        self._words = [0] * len(rows.sets)

    def add(self, row: int, set_number: int, facts: Facts) -> None:
        """Takes note of a row."""
        self._words[set_number] += len(facts.prompt_words) + len(facts.answer_words)
        if row in self._sample:
            self._sample[row] = facts

    def measure(self) -> dict[str, Any]:
        """Returns the measures, as plain lists and dicts."""
        found = {row: facts for row, facts in self._sample.items() if facts is not None}
        prompts = {row: facts.prompt_words[:LONGEST] for row, facts in found.items() if len(facts.prompt_words)}
        answers = [facts.answer_words[:LONGEST] for facts in found.values()]
        signatures = [facts.signature for facts in found.values() if facts.signature is not None][:PAIRS]
        return {
            "split": self._split,
            "sampled_rows": len(found),
            "distinct_ngrams": {"prompts": distinct_ngrams(list(prompts.values())), "answers": distinct_ngrams(answers)},
            "compared_rows": len(signatures),
            "self_similarity": self_similarity(np.asarray(signatures)) if len(signatures) > 1 else None,
            "prompt_clusters": self._clusters(prompts),
            "sets": self._shares(),
        }

    def _shares(self) -> list[dict[str, Any]]:
        numbers = [number for number, item in enumerate(self._rows.sets) if item.split == self._split]
        rows = sum(len(self._rows.sets[number].rows) for number in numbers)
        total = max(1, sum(self._words[number] for number in numbers))
        result = []
        for number in numbers:
            item = self._rows.sets[number]
            shares = {"share_of_rows": round(len(item.rows) / rows, 4), "share_of_words": round(self._words[number] / total, 4)}
            result.append({"set": item.key, "rows": len(item.rows), **shares})
        return result

    def _clusters(self, prompts: dict[int, np.ndarray]) -> dict[str, Any] | None:
        count = min(CLUSTERS, len(prompts) // 10)
        if count < 2:
            return None
        rows = list(prompts)
        labels, nearness = cluster(hashed_tf_idf(list(prompts.values())), count)
        clusters = []
        for label, size in sorted(
            enumerate(np.bincount(labels, minlength=count).tolist()), key=lambda pair: (-pair[1], pair[0])
        ):
            if size:
                member = int(np.where(labels == label, nearness, -np.inf).argmax())
                texts = self._rows.texts(rows[member])
                clusters.append({"share": round(size / len(rows), 4), "example": snippet(texts.question or texts.prompt, 80)})
        return {"largest_share": clusters[0]["share"], "clusters": clusters}


def distinct_ngrams(texts: list[np.ndarray]) -> dict[str, float | None]:
    """Returns the share of runs of 1, 2 and 3 words that are distinct, from hashes of words; None where there is no run."""
    result = {}
    for size in (1, 2, 3):
        runs = np.concatenate([hash_runs(text, size) for text in texts]) if texts else np.zeros(0, np.uint64)
        result[str(size)] = round(len(np.unique(runs)) / len(runs), 4) if len(runs) else None
    return result


def self_similarity(signatures: np.ndarray) -> float:
    """Returns the mean Jaccard similarity of all pairs of rows, estimated from signatures, uint32 [n, permutations]."""
    count, total = len(signatures), 0
    for column in signatures.T:  # pairs that agree: of each value the pairs of those that have it
        _, sizes = np.unique(column, return_counts=True)
        total += int((sizes * (sizes - 1) // 2).sum())
    return round(total / (signatures.shape[1] * count * (count - 1) / 2), 5)


def hashed_tf_idf(texts: list[np.ndarray]) -> np.ndarray:
    """Returns a vector of length 1 for each text, float32 [n, buckets], from hashes of its words (none empty)."""
    counts = np.zeros((len(texts), _BUCKETS), np.float32)
    for place, text in enumerate(texts):
        counts[place] = np.bincount(text % _BUCKETS, minlength=_BUCKETS)
    rarity = np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1
    vectors = np.log1p(counts) * rarity.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def cluster(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means from centres that are far apart (k-means++ with fixed random bits).

    Args:
        vectors: float32 [n, d] of length 1.
        count: clusters, at most n.

    Returns (number of the cluster, int64 [n]; cosine with its centre, float32 [n]).
    """
    bits = random_bits(derive_key("doctor", "centres"), count) / 2.0**64
    centres = [vectors[int(bits[0] * len(vectors))]]
    nearest = vectors @ centres[0]
    for bit in bits[1:]:
        distance = np.cumsum(np.maximum(1 - nearest, 0).astype(np.float64))
        centres.append(vectors[min(int(np.searchsorted(distance, bit * distance[-1], side="right")), len(vectors) - 1)])
        nearest = np.maximum(nearest, vectors @ centres[-1])
    centre, labels = np.stack(centres), None
    for _ in range(_ROUNDS):
        cosines = vectors @ centre.T
        new = cosines.argmax(1)
        if labels is not None and (new == labels).all():
            break
        labels = new
        for number in range(count):
            mean = vectors[labels == number].sum(0)
            norm = np.linalg.norm(mean)
            if norm > 0:  # a centre that lost its rows stays where it is
                centre[number] = mean / norm
    return labels, cosines[np.arange(len(vectors)), labels]
