"""Held-out answers: a fixed sample of each eval set, answered greedily and compared with the reference."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_jax.data.pipeline import RowStream
from sft_jax.data.randomness import derive_key, permutation
from sft_jax.data.tokens import Tokenizer
from sft_jax.evaluation.generate import generate_ids
from sft_jax.evaluation.scorers import SCORERS, Score
from sft_jax.evaluation.text import continuation_text
from sft_jax.model.decoder import Decoder


@dataclass(frozen=True)
class HeldOut:
    """A prompt with its reference answer, and the row they are from."""

    file: str
    line: int
    turn: int  # -1 for a whole row
    prompt_ids: list[int]
    reference_ids: list[int]  # with the end of turn


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


def sample_held_out(stream: RowStream, count: int, seed: int) -> list[HeldOut]:
    """Returns `count` documents of a stream, or all where there are fewer, drawn by `seed`, in file order."""
    drawn = permutation(derive_key(seed, "held-out answers"), stream.document_count)[:count]
    result = []
    for index in np.sort(drawn).tolist():
        example, ids, weights = stream.document(index)
        _, file, line, turn = stream.identity(example)
        result.append(HeldOut(file, line, turn, *last_answer(ids, weights)))
    return result


def evaluate_generations(
    decoder: Decoder,
    tokenizer: Tokenizer,
    held_out: Sequence[HeldOut],
    stop_ids: Collection[int],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    between: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answers the prompts greedily and scores the answers.

    Texts are without special tokens, and the reference ends before its first stop token, as the answer does. Every
    process of a multi-process run must call this with the same arguments. `between` is that of `generate_ids`.

    Returns:
        ({name of a scorer: mean}, one record per prompt: "example", "prompt", "reference", "generation", a value per
        scorer, and "finished": whether the model ended the answer itself).
    """
    prompts = [item.prompt_ids for item in held_out]
    answers = generate_ids(decoder, prompts, list(stop_ids), max_new_tokens, batch_size=batch_size, between=between)
    totals = dict.fromkeys(SCORERS, Score())
    records = []
    for item, answer in zip(held_out, answers, strict=True):
        reference_ids = item.reference_ids
        stop = next((place for place, token in enumerate(reference_ids) if token in stop_ids), len(reference_ids))
        reference = continuation_text(tokenizer, item.prompt_ids, reference_ids[:stop])
        generation = continuation_text(tokenizer, item.prompt_ids, answer.ids)
        scores = {name: scorer(generation, reference) for name, scorer in SCORERS.items()}
        totals = {name: totals[name] + scores[name] for name in SCORERS}
        records.append(
            {
                "example": {"file": item.file, "line": item.line, "turn": item.turn},
                "prompt": tokenizer.decode(item.prompt_ids),
                "reference": reference,
                "generation": generation,
                **{name: value.mean for name, value in scores.items()},
                "finished": answer.finished,
            }
        )
    return {name: total.mean for name, total in totals.items()}, records
