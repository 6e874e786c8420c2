"""The isolation contract: what a document of a packed row contains never reaches another document."""

from collections.abc import Callable

import jax
import numpy as np


def isolation_breaches(
    logits: Callable[[np.ndarray], jax.Array], tokens: np.ndarray, segments: np.ndarray, vocab_size: int
) -> list[tuple[int, int, int]]:
    """Returns (row, changed segment, position) wherever changing one segment changed a logit outside of it.

    `logits` maps tokens [B, L] to [B, L, V] for the packed rows `segments` [B, L]. Every segment's tokens, padding's
    (segment 0) too, are replaced in turn by others, and every bit of the logits of the other documents must stay. An
    empty list means that the contract holds. Raises ValueError where a change of a document does not change its own
    logits, since then nothing would be shown.
    """
    before = np.asarray(logits(tokens))
    breaches = []
    for segment in range(int(segments.max()) + 1):
        inside = segments == segment
        after = np.asarray(logits(np.where(inside, (tokens + 1 + segment) % vocab_size, tokens)))
        changed = (before != after).any(axis=-1)
        if segment > 0 and not changed[inside].any():
            raise ValueError(f"changing segment {segment} changed nothing: the logits do not depend on the tokens")
        breaches += [(int(row), segment, int(at)) for row, at in np.argwhere(changed & ~inside & (segments > 0))]
    return breaches
