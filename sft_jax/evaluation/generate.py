"""Generation: greedy or sampled answers to prompts of any lengths. An answer that is done makes room for another prompt."""

import collections
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.prompts import Prompt, PromptReader, stop_ids_of
from sft_jax.evaluation.sampling import Sampling, sampling
from sft_jax.evaluation.slots import Generation, NumberedPrompt, Slots
from sft_jax.evaluation.text import StopStrings, continuation_text, cut_before
from sft_jax.model.decoder import Decoder

_GREEDY = sampling()
_STEPS = 64  # tokens between two looks at what is done
_STEPS_TO_TEXT = 8  # the same where stop strings are looked for, which the host does: so many tokens may be too many


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
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
        temperature, top_k, top_p, min_p, repetition_penalty: see `sft_jax.evaluation.sampling.sampling`; temperature 0
            is greedy.
        seed: of the draws. An answer depends on the seed, the prompt, and how many equal prompts stand before it in
            `prompts`; not on the other prompts, their order or the batch size.
        stop: texts that end an answer and are not part of it.
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
        options=sampling(temperature, top_k, top_p, min_p, repetition_penalty), seed=seed, batch_size=batch_size,
        stop=StopStrings(tokenizer, stop, skip_special_tokens) if stop else None,
    )  # fmt: skip
    return [
        cut_before(continuation_text(tokenizer, prompt, answer.ids, skip_special_tokens), stop)
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
    stop: StopStrings | None = None,
    between: Callable[[int], None] = lambda done: None,
) -> list[Generation]:
    """Returns the answer to every prompt, in their order. See `generate`.

    Long prompts come first, so that those that are read together are of about the same length; each goes into the slot
    of an answer that is done. The parameters may lie on any mesh; rows are split over it as in training. `between` is
    called now and then with the number of answers that are done; what it raises ends the generation.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, not {max_new_tokens}.")
    if batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, not {batch_size}.")
    if not len(prompt_ids):
        return []
    waiting = collections.deque(sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index])))
    numbers = draw_numbers(prompt_ids)
    longest = len(prompt_ids[waiting[0]])
    slots = Slots(decoder, min(batch_size, len(waiting)), longest, stop_ids, max_new_tokens, options, seed)
    held: dict[int, int] = {}  # slot -> index of the prompt in it
    watches = {}  # slot -> the text of its answer
    answers: list[Generation | None] = [None] * len(prompt_ids)
    while waiting or held:
        between(len(prompt_ids) - len(waiting) - len(held))
        free = [slot for slot in range(slots.count) if slot not in held]
        if waiting and len(free) >= min(slots.refill, len(waiting)):
            taken = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            slots.fill({slot: NumberedPrompt(prompt_ids[index], numbers[index]) for slot, index in taken.items()})
            held |= taken
            if stop is not None:
                watches |= {slot: stop.watch(prompt_ids[index]) for slot, index in taken.items()}
        slots.advance(_STEPS if stop is None else _STEPS_TO_TEXT, min(slots.refill, len(waiting)) if waiting else None)
        done = slots.done()
        looked_at = [slot for slot in held if done[slot] or stop is not None]
        stopped = []
        for slot, answer in zip(looked_at, slots.answers(looked_at) if looked_at else (), strict=True):
            size = watches[slot].push(answer.ids) if stop is not None else None
            if size is not None:
                answer = Generation(answer.ids[:size], True)
                if not done[slot]:
                    stopped.append(slot)
            elif not done[slot]:
                continue
            answers[held.pop(slot)] = answer
            watches.pop(slot, None)
        if stopped:
            slots.end(stopped)
    between(len(prompt_ids))
    return answers


def draw_numbers(prompt_ids: Sequence[Sequence[int]]) -> list[int]:
    """Returns the number of each prompt, from which its random bits follow: of its tokens, and of the equal ones before it."""
    seen: collections.Counter[bytes] = collections.Counter()
    numbers = []
    for ids in prompt_ids:
        content = np.asarray(ids, "<i4").tobytes()
        digest = hashlib.blake2b(content + seen[content].to_bytes(4, "little"), digest_size=4)
        numbers.append(int.from_bytes(digest.digest(), "little"))
        seen[content] += 1
    return numbers
