"""Corpus: the examples of several stores under one numbering, with the look-ups that cutting and packing need.

Examples are numbered over all sets, in the order of the sets. Tokens have a place on one line too: example e holds
the places [offsets[e], offsets[e + 1]). Nothing here copies token ids; they stay in the memmaps of the stores.
"""

from collections.abc import Sequence

import numpy as np

from sft_jax.data.packing.plan import ragged_arange
from sft_jax.data.stores.store import Store


class Corpus:
    """Several named stores, read only."""

    def __init__(self, names: Sequence[str], stores: Sequence[Store]):
        self.names = tuple(names)
        self.stores = tuple(stores)
        self.bases = np.concatenate([[0], np.cumsum([len(store) for store in stores], dtype=np.int64)])  # [sets + 1]
        if self.bases[-1] >= 1 << 31:
            raise ValueError(f"{self.bases[-1]} examples are more than an int32 can number")
        self.lengths = np.concatenate([store.lengths for store in stores])  # [examples], tokens
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])  # [examples + 1], places
        self._run_ends = np.cumsum(np.concatenate([store.run_lengths for store in stores]))  # places
        self._run_weights = np.concatenate([store.run_weights for store in stores])
        runs = np.diff(self._run_ends, prepend=0)
        self._run_starts = self._run_ends - runs
        self._supervised_ends = np.cumsum(np.where(self._run_weights > 0, runs, 0))  # supervised tokens up to run ends
        self._weight_ends = np.cumsum(self._run_weights.astype(np.float64) * runs)
        parts = [ids for store in stores for ids in store.ids]
        self._ids = parts
        self._id_starts = np.concatenate([[0], np.cumsum([len(ids) for ids in parts], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.bases[-1])

    def set_of(self, example: int) -> int:
        """Returns the number of the set that an example belongs to."""
        return int(np.searchsorted(self.bases, example, side="right")) - 1

    def identity(self, example: int) -> tuple[str, str, int, int]:
        """Returns (set, file, line, turn) of an example. Raises IndexError where there is no such example."""
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of {len(self)}")
        index = self.set_of(example)
        store, local = self.stores[index], example - int(self.bases[index])
        return self.names[index], store.file_names[store.files[local]], store.lines[local], store.turns[local]

    def where(self, example: int) -> str:
        """Returns "file:line" of an example."""
        _, file, line, _ = self.identity(example)
        return f"{file}:{line}"

    def turns(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (token offsets at which the messages of an example begin, their role codes), see store.ROLES."""
        index = self.set_of(example)
        store, local = self.stores[index], example - int(self.bases[index])
        return store.turns_of(local)

    def supervised_before(self, places: np.ndarray) -> np.ndarray:
        """Returns how many of all tokens before each place have a weight above 0, int64."""
        return self._before(places, self._supervised_ends, self._run_weights > 0)

    def weight_before(self, places: np.ndarray) -> np.ndarray:
        """Returns the sum of the weights of all tokens before each place, float64."""
        return self._before(places, self._weight_ends, self._run_weights.astype(np.float64))

    def _before(self, places: np.ndarray, totals: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """Returns the running total at `places`: it is linear inside a run, with the slope `rates`."""
        if not len(totals):
            return np.zeros(len(places), totals.dtype)
        run = np.searchsorted(self._run_ends, places, side="left")
        run = np.minimum(run, len(totals) - 1)
        return totals[run] - (self._run_ends[run] - places) * rates[run]

    def read_ids(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Returns the token ids of the ranges [starts, stops) of places, concatenated, int32.

        A range lies in one example.
        """
        result = np.empty(int((stops - starts).sum()), np.int32)
        shards = np.searchsorted(self._id_starts, starts, side="right") - 1
        at = 0
        for shard, start, stop in zip(shards.tolist(), starts.tolist(), stops.tolist(), strict=True):
            base = int(self._id_starts[shard])
            result[at : at + stop - start] = self._ids[shard][start - base : stop - base]
            at += stop - start
        return result

    def read_weights(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Returns the weights of the tokens of the ranges [starts, stops) of places, concatenated, float32."""
        first = np.searchsorted(self._run_ends, starts, side="right")
        last = np.searchsorted(self._run_ends, stops, side="left")  # the run that holds the last token
        counts = last - first + 1
        runs = ragged_arange(first, counts)
        begins = np.maximum(self._run_starts[runs], np.repeat(starts, counts))
        ends = np.minimum(self._run_ends[runs], np.repeat(stops, counts))
        return np.repeat(self._run_weights[runs], ends - begins)
