"""Choosing an answer by its likelihood: each choice of a row takes the place of the row's last answer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sft_jax.config import Config
from sft_jax.data.chats.chat import build_rows
from sft_jax.data.chats.templates import resolve_template
from sft_jax.data.examples import BadRow, RowError
from sft_jax.data.formats.conversation import Conversation
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.answers import last_answer
from sft_jax.evaluation.held_out_rows import HeldOutRows
from sft_jax.evaluation.likelihoods import Likelihood
from sft_jax.evaluation.scoring import Answer, Choice, Scorer

Sequences = list[tuple[list[int], list[int]]]
Score = Callable[[Sequences], list[Likelihood]]


def read_choices(
    held: HeldOutRows, documents: Sequence[int], column: str, tokenizer: Tokenizer, config: Config, score: Score
) -> list[tuple[Choice, ...]]:
    """Returns the choices of the rows of `documents`, each with the likelihood of its being the row's last answer.

    The tokens of a choice are those that training on it would have made, so that it is judged exactly as it would be
    generated, up to the end of turn. Raises UserError naming the row where `column` holds no list of texts, and where the
    row's format has no answer that could be replaced.
    """
    template = resolve_template(config.data.chat_template, tokenizer)
    texts, conversations, places, own = [], [], [], []
    for document, row in zip(documents, held.rows(documents), strict=True):
        choices, where = row.get(column), held.where(document)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(item, str) and item for item in choices):
            raise UserError(f"{where}: the column '{column}' must hold a list of at least two texts to choose from, not {choices!r:.200}.")
        try:
            conversation = FORMATS[held.format].read(row, held.config.columns)
            conversations += [_with_answer(conversation, text, where) for text in choices]
            own.append(_answer(conversation).strip())
        except RowError as error:
            raise UserError(f"{where}: {error}") from error
        if own[-1] not in map(str.strip, choices):
            raise UserError(f"{where}: its answer {own[-1]!r:.200} is none of those in the column '{column}': {choices!r:.300}.")
        texts.append(choices)
        places += [where] * len(choices)
    built = build_rows(
        conversations, tokenizer, template, supervise=held.config.supervise, template_kwargs=config.data.chat_template_kwargs,
        allow_special_tokens=config.data.allow_special_tokens_in_content,
    )  # fmt: skip
    sequences = [_sequence(row, where) for row, where in zip(built, places, strict=True)]
    found = iter(score(sequences))
    return [
        tuple(Choice(text, next(found).log_likelihood, text.strip() == right) for text in choices)
        for choices, right in zip(texts, own, strict=True)
    ]


def _answer(conversation: Conversation) -> str:
    """Returns the last answer of a conversation that `_with_answer` takes."""
    if conversation.kind == "completion":
        return conversation.completion
    return next(message.content for message in reversed(conversation.messages) if message.role == "assistant")


def _with_answer(conversation: Conversation, text: str, where: str) -> Conversation:
    """Returns the conversation with another last answer."""
    if conversation.kind == "completion":
        return replace(conversation, completion=text)
    if conversation.kind == "chat":
        last = max((n for n, message in enumerate(conversation.messages) if message.role == "assistant"), default=None)
        if last is not None and not conversation.messages[last].calls:
            answer = replace(conversation.messages[last], content=text, reasoning=None, pieces=())
            return replace(conversation, messages=(*conversation.messages[:last], answer))
    raise UserError(f"{where}: has no answer in whose place a choice could stand; choices need a chat or a prompt with a completion.")


def _sequence(built: Any, where: str) -> tuple[list[int], list[int]]:
    if isinstance(built, BadRow):
        raise UserError(f"{where}: {built.reason}")
    example = built.examples[-1]
    try:
        return last_answer(example.ids, example.weights)
    except ValueError as error:
        raise UserError(f"{where}: the answer is not supervised, so there is nothing to judge a choice by; see data.supervise.") from error


def choice(argument: str | None, by_byte: bool = False) -> Scorer:
    """Returns the scorer of the most likely choice, of those in the column `argument` of the row: 1 where it is the row's own answer.

    With `by_byte` log-likelihoods are divided by the bytes of the texts, which does not favour short ones.
    """
    column = argument or "choices"

    def statistics(answer: Answer) -> tuple[float, float]:
        values = [item.log_likelihood / (len(item.text.encode()) if by_byte else 1) for item in answer.choices]
        return float(answer.choices[values.index(max(values))].right), 1.0

    return Scorer(statistics, choices=column)
