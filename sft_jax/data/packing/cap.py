"""Cap: a sample of the rows of a data set, where no more than so many are to be used.

Every row has random bits of its own, and the rows with the smallest are taken. So the sample has no bias, whatever the
order of the file; it is the same in every epoch and on every number of processes; a larger cap keeps every row of a smaller
one. It is drawn after the over-length policy, so that there are `cap` rows wherever so many can be trained on. The store
holds all rows, so another cap prepares nothing again.
"""

import numpy as np

from sft_jax.data.packing.corpus import Corpus
from sft_jax.data.packing.overlength import Documents
from sft_jax.data.randomness import derive_key, random_bits


def apply_cap(corpus: Corpus, set_index: int, documents: Documents, cap: int | None, seed: int) -> tuple[Documents, int]:
    """Returns the documents of the `cap` sampled rows of one set, and how many rows were left out; None takes all.

    A row is taken with all of its documents: examples of several turns, pieces of a long one.
    """
    if cap is None:
        return documents, 0
    store = corpus.stores[set_index]
    row_of = store.rows.whole()[documents.example - corpus.bases[set_index]]  # [documents]
    rows = np.unique(row_of)
    bits = random_bits(derive_key(seed, "cap", corpus.names[set_index]), int(rows[-1]) + 1)[rows]
    taken = rows[np.argsort(bits, kind="stable")[:cap]]
    return documents.select(np.isin(row_of, taken)), len(rows) - len(taken)
