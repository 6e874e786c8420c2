"""Generation: greedy or sampled answers to prompts of any lengths, on whatever mesh the model lies."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.data.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation import decoding
from sft_jax.evaluation.prompts import Prompt, PromptReader, stop_ids_of
from sft_jax.evaluation.sampling import Sampling, sampling
from sft_jax.evaluation.text import continuation_text
from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import batch_sharding, pieces_along

_GREEDY = sampling()


class Generation(NamedTuple):
    """An answer."""

    ids: list[int]  # without the stop token
    finished: bool  # the model chose a stop token; False: cut at max_new_tokens


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    chat_template: str = "auto",
    chat_template_kwargs: dict[str, Any] | None = None,
    batch_size: int = 32,
    skip_special_tokens: bool = True,
) -> list[str]:
    """Returns the model's answer to every prompt, as the text by which the prompt goes on.

        model, tokenizer = sft_jax.load("runs/quickstart")
        sft_jax.generate(model, tokenizer, ["Once upon a time"])
        sft_jax.generate(model, tokenizer, [[{"role": "user", "content": "Hello"}]], temperature=0.7, top_p=0.9)

    Args:
        prompts: each a text, which is continued; a list of chat messages, which is rendered by the model's chat
            template with the start of an assistant turn; or a list of token ids, which is taken as it is.
        max_new_tokens: of each answer, at most.
        temperature, top_k, top_p: see `sft_jax.evaluation.sampling.sampling`; temperature 0 is greedy.
        seed: of the draws. An answer depends on the seed, the prompt and its place in `prompts`, on nothing else.
        stop_ids: tokens that end an answer and are not part of it. None: those of the model's generation
            configuration, the tokenizer's EOS, and the end of turn of its chat template.
        chat_template, chat_template_kwargs: as `data.chat_template` and `data.chat_template_kwargs` in training.
        batch_size: sequences that are decoded together, at most.
        skip_special_tokens: leave special tokens out of the text.

    Every process of a multi-process run must call this with the same arguments. Raises UserError for an argument out
    of range, for messages without a chat template, and for a prompt of no tokens.
    """
    if tokenizer is None:
        raise UserError("tokenizer: is missing; the model's directory holds none, so load one with it.")
    reader = PromptReader(tokenizer, chat_template, chat_template_kwargs)
    if isinstance(prompts, str):
        raise UserError("prompts: is one text; give a list of prompts.")
    prompt_ids = [reader.ids(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]
    source = getattr(model, "source", None)  # only a decoder that was read from a directory has one
    stops = stop_ids_of(source, tokenizer, reader) if stop_ids is None else stop_ids
    answers = generate_ids(
        model, prompt_ids, stops, max_new_tokens,
        options=sampling(temperature, top_k, top_p), seed=seed, batch_size=batch_size,
    )  # fmt: skip
    return [
        continuation_text(tokenizer, prompt, answer.ids, skip_special_tokens)
        for prompt, answer in zip(prompt_ids, answers, strict=True)
    ]


def generate_ids(
    decoder: Decoder,
    prompt_ids: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    *,
    options: Sampling = _GREEDY,
    seed: int = 0,
    batch_size: int = 32,
    between: Callable[[], None] = lambda: None,
) -> list[Generation]:
    """Returns the answer to every prompt, in their order. See `generate`.

    Prompts of about the same length are decoded together. The parameters may lie on any mesh; rows are split over it
    as in training. `between` is called before each batch; what it raises ends the generation.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, not {max_new_tokens}.")
    if batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, not {batch_size}.")
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    answers: list[Generation | None] = [None] * len(prompt_ids)
    for first in range(0, len(order), batch_size):
        between()
        group = order[first : first + batch_size]
        batch = DecodingBatch(decoder, [prompt_ids[i] for i in group], stop_ids, max_new_tokens, options, seed, group)
        batch.advance(max_new_tokens)
        for index, answer in zip(group, batch.answers(), strict=True):
            answers[index] = answer
    return answers


class DecodingBatch:
    """Prompts whose answers are decoded together, all at once or a few tokens at a time."""

    def __init__(
        self,
        decoder: Decoder,
        prompt_ids: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        options: Sampling = _GREEDY,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ):
        """Reads the prompts and chooses the first token of every answer; `numbers` are those of the prompts."""
        self._decoder, self._options = decoder, options
        self._lengths = np.array([len(ids) for ids in prompt_ids], np.int32)
        if not len(prompt_ids) or not self._lengths.min():
            raise ValueError("there is no prompt, or one has no tokens")
        for ids in prompt_ids:
            if not (0 <= min(ids) and max(ids) < decoder.spec.vocab_size):
                raise UserError(
                    f"A prompt holds token {max(ids) if min(ids) >= 0 else min(ids)}, outside the model's vocabulary "
                    f"of {decoder.spec.vocab_size}; tokenizer and model do not belong together."
                )
        mesh = mesh_of(decoder)
        rows = _batch_rows(len(prompt_ids), mesh)
        longest = int(self._lengths.max())
        chunk = min(decoding.round_up(longest), decoding.MAX_CHUNK)
        room = -(-decoding.round_up(longest + max_new_tokens) // chunk) * chunk
        tokens = np.zeros((rows, room), np.int32)
        for row, ids in enumerate(prompt_ids):
            tokens[row, : len(ids)] = ids
        lengths = np.pad(self._lengths, (0, rows - len(prompt_ids)))
        numbers = np.arange(len(prompt_ids)) if numbers is None else np.asarray(numbers)
        numbers = np.pad(numbers.astype(np.int32), (0, rows - len(prompt_ids)))
        stops = np.full(-(-max(len(stop_ids), 1) // 8) * 8, -1, np.int32)
        stops[: len(stop_ids)] = list(stop_ids)
        by_row, self._whole = _placers(decoder, mesh)
        self._stops = self._whole(stops)
        self._limit = self._whole(np.int32(max_new_tokens))
        self._state = decoding.start(
            decoder, by_row(tokens), by_row(lengths), by_row(numbers), self._whole(np.uint32(seed % 2**32)),
            self._stops, options, chunk=chunk,
        )  # fmt: skip

    def advance(self, steps: int) -> None:
        """Adds up to `steps` tokens to every answer."""
        self._state = decoding.advance(
            self._decoder, self._state, self._stops, self._options, self._limit, self._whole(np.int32(steps))
        )

    @property
    def running(self) -> bool:
        """Whether `advance` would add anything."""
        wanted = (self._state.done, self._state.count, self._limit)
        done, count, limit = jax.device_get(decoding.replicated(self._decoder, wanted))
        return bool(count < limit and not done.all())

    def answers(self) -> list[Generation]:
        """Returns the answers so far."""
        wanted = (self._state.tokens, self._state.lengths, self._state.stopped)
        tokens, lengths, stopped = jax.device_get(decoding.replicated(self._decoder, wanted))
        return [
            Generation(tokens[row, prompt : lengths[row]].tolist(), bool(stopped[row]))
            for row, prompt in enumerate(self._lengths.tolist())
        ]


def mesh_of(decoder: Decoder) -> Mesh | None:
    """Returns the mesh on which the parameters lie, None where they lie on one device without a mesh."""
    sharding = decoder.embed.embedding[...].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _batch_rows(prompts: int, mesh: Mesh | None) -> int:
    """Returns the rows of a batch: one of few sizes times the number of devices that rows are split over."""
    split = pieces_along(mesh, "batch") if mesh is not None else 1
    each = -(-prompts // split)
    return split * (decoding.round_up(each) if each > 4 else 1 << (each - 1).bit_length())


Place = Callable[[np.ndarray | np.generic], jax.Array]


def _placers(decoder: Decoder, mesh: Mesh | None) -> tuple[Place, Place]:
    """Returns two functions that put a host array where the parameters are: rows split, and whole on every device.

    Every process gives the same array and keeps the part for its own devices.
    """
    if mesh is None:
        device = decoder.embed.embedding[...].sharding
        return (lambda x: jax.device_put(x, device),) * 2

    def placer(sharding: NamedSharding) -> Place:
        return lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

    return placer(batch_sharding(mesh)), placer(NamedSharding(mesh, PartitionSpec()))
