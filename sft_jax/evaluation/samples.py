"""Held-out answers: a fixed sample of each eval set, answered by the model and compared with the references."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sft_jax.config import EvalConfig
from sft_jax.data.packing.pipeline import RowStream
from sft_jax.data.randomness import derive_key, permutation
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.evaluation.answers import last_answer
from sft_jax.evaluation.generate import generate_ids
from sft_jax.evaluation.sampling import Sampling, sampling
from sft_jax.evaluation.scoring import Answer, Scored, Scorer, score
from sft_jax.evaluation.slots import Generation
from sft_jax.evaluation.text import StopStrings, continuation_text, cut_before
from sft_jax.model.decoder import Decoder


@dataclass(frozen=True)
class HeldOut:
    """A prompt with its reference answer, and the row they are from."""

    file: str
    line: int
    turn: int  # -1 for a whole row
    document: int  # in the order of the files
    prompt_ids: list[int]
    reference_ids: list[int]  # with the end of turn


def sample_held_out(stream: RowStream, count: int | None, seed: int) -> list[HeldOut]:
    """Returns `count` documents of a stream, or all where there are fewer or it is None, drawn by `seed`, in file order."""
    drawn = permutation(derive_key(seed, "held-out answers"), stream.document_count)[:count]
    result = []
    for index in np.sort(drawn).tolist():
        example, ids, weights = stream.document(index)
        _, file, line, turn = stream.identity(example)
        result.append(HeldOut(file, line, turn, index, *last_answer(ids, weights)))
    return result


@dataclass(frozen=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    batch_size: int = 32
    options: Sampling = field(default_factory=sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end an answer


def decoding_of(config: EvalConfig, batch_size: int) -> Decoding:
    """Returns how the prompts of an evaluation are answered, `batch_size` of them together."""
    drawn = vars(config.sampling)
    options = sampling(**{name: value for name, value in drawn.items() if name != "seed"})
    return Decoding(config.max_new_tokens, batch_size, options, config.sampling.seed, config.stop)


def generate_answers(
    decoder: Decoder,
    tokenizer: Tokenizer,
    held_out: Sequence[HeldOut],
    stop_ids: Collection[int],
    decoding: Decoding,
    rows: Sequence[Mapping[str, Any]] | None = None,
    between: Callable[[int], None] = lambda done: None,
) -> tuple[list[Answer], list[Generation]]:
    """Answers the prompts, and returns the answers beside their references.

    Texts are without special tokens, and the reference ends before its first stop token or text, as the answer does. Every
    process of a multi-process run must call this with the same arguments. `rows` are those of the prompts, where scorers
    look at them. `between` is that of `generate_ids`.
    """
    generations = generate_ids(
        decoder, [item.prompt_ids for item in held_out], list(stop_ids), decoding.max_new_tokens, options=decoding.options,
        seed=decoding.seed, batch_size=decoding.batch_size,
        stop=StopStrings(tokenizer, decoding.stop) if decoding.stop else None, between=between,
    )  # fmt: skip
    answers = [
        answer_of(tokenizer, item, generation.ids, stop_ids, decoding.stop, {} if rows is None else rows[number])
        for number, (item, generation) in enumerate(zip(held_out, generations, strict=True))
    ]
    return answers, generations


def answer_of(
    tokenizer: Tokenizer, item: HeldOut, ids: Sequence[int], stop_ids: Collection[int], stop: Sequence[str], row: Mapping[str, Any]
) -> Answer:
    """Returns the answer `ids` beside the reference, both as text that ends before the first stop token or text."""
    end = next((place for place, token in enumerate(item.reference_ids) if token in stop_ids), len(item.reference_ids))
    texts = [cut_before(continuation_text(tokenizer, item.prompt_ids, each), stop) for each in (ids, item.reference_ids[:end])]
    return Answer(*texts, tokenizer.decode(item.prompt_ids), row)


def score_answers(scorers: Mapping[str, Scorer], answers: Sequence[Answer]) -> dict[str, Scored]:
    """Returns the statistics of each scorer over the answers."""
    return {name: score(scorer, answers) for name, scorer in scorers.items()}


def sample_records(
    held_out: Sequence[HeldOut], answers: Sequence[Answer], generations: Sequence[Generation], scored: Mapping[str, Scored]
) -> list[dict[str, Any]]:
    """Returns a record per prompt: "example", "prompt", "reference", "generation", a value per scorer, and "finished".

    "finished" says whether the model ended the answer itself. A score is None where the answer does not count.
    """
    each = {name: values.of_each() for name, values in scored.items()}
    return [
        {
            "example": {"file": item.file, "line": item.line, "turn": item.turn},
            "prompt": answer.prompt,
            "reference": answer.reference,
            "generation": answer.generation,
            **{name: values[number] for name, values in each.items()},
            "finished": generation.finished,
        }
        for number, (item, answer, generation) in enumerate(zip(held_out, answers, generations, strict=True))
    ]
