"""The answer of a prepared example: what is generated, and from what."""

import numpy as np


def last_answer(ids: np.ndarray, weights: np.ndarray) -> tuple[list[int], list[int]]:
    """Returns (the ids before the last supervised run of tokens, the run).

    The prompt is what inference would feed, since a supervised run begins where that ends. The first token is never a
    target, so a text that is supervised as a whole gives a prompt of one token.

    >>> last_answer(np.array([7, 8, 9, 5, 6]), np.array([0, 1, 0, 1, 1]))
    ([7, 8, 9], [5, 6])
    """
    supervised = np.asarray(weights) > 0
    supervised[0] = False
    if not supervised.any():
        raise ValueError("the document has no supervised token")
    stop = int(np.flatnonzero(supervised)[-1]) + 1
    first = int(np.flatnonzero(~supervised[:stop])[-1]) + 1
    return ids[:first].tolist(), ids[first:stop].tolist()
