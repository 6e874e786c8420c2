"""From a question to the tokens that a model is asked with: system prompt, examples and all, as training would have them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sft_jax.comparison.contenders import Contender
from sft_jax.comparison.questions import SYSTEM_ROLES, Question, has_system, with_system, without_system
from sft_jax.comparison.retrieval import TextIndex
from sft_jax.data.chats.chat import build_rows
from sft_jax.data.chats.templates import ChatTemplate
from sft_jax.data.examples import BadRow
from sft_jax.data.formats.conversation import Conversation
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.answers import last_answer
from sft_jax.evaluation.samples import HeldOut

GAP = "\n\n"  # between examples, where they are text in front of the prompt


@dataclass(frozen=True)
class Form:
    """How a model is asked: its tokenizer, its template, and what ends its answers."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: prompts and completions are joined as they are
    template_kwargs: dict[str, Any]
    allow_special_tokens: bool
    stop_ids: tuple[int, ...]
    context: int | None  # tokens of prompt and answer, at most; None = not known


@dataclass(frozen=True)
class Asked:
    """The prompts of a contender, one for each question."""

    items: list[HeldOut]
    shown: list[list[Question]]  # the examples in each
    fits: list[bool]  # whether prompt and answer have room in the model's context
    notes: list[str] = field(default_factory=list)


class Shelf:
    """The examples that may be shown."""

    def __init__(self, pool: Sequence[Question]):
        self._pool, self._index = pool, None

    def __len__(self) -> int:
        return len(self._pool)

    def __iter__(self) -> Iterator[Question]:
        return iter(self._pool)

    def take(self, question: Question, count: int, nearest: bool) -> list[Question]:
        """Returns `count` examples for a question, the most similar last, where the model reads it just before it answers."""
        if not nearest:
            return list(self._pool[:count])
        if self._index is None:
            self._index = TextIndex([each.asked for each in self._pool])
        return [self._pool[place] for place in reversed(self._index.nearest(question.asked, count))]


def ask(form: Form, contender: Contender, questions: Sequence[Question], shelf: Shelf, most: int) -> Asked:
    """Returns the prompts of a contender whose number of examples is known.

    The tokens are those that training on the same conversation would have before its last answer.

    Args:
        most: tokens of an answer.

    Raises UserError naming the row that the template refuses, and where there are fewer examples.
    """
    count, nearest = (contender.examples.count, contender.examples.nearest) if contender.examples is not None else (0, False)
    if count > len(shelf):
        flag = "--retrieve" if nearest else "--shots"
        raise UserError(
            f"{flag}: asks for {count:,} examples, and {len(shelf):,} training rows can be shown; ask for fewer, or name more rows in data.train."
        )
    shown = [shelf.take(question, count, nearest) for question in questions]
    text = contender.system.text if contender.system is not None else None
    chat = form.template is not None
    conversations = [composed(question, shots, text, chat) for question, shots in zip(questions, shown, strict=True)]
    built = build_rows(
        conversations, form.tokenizer, form.template, supervise="last", template_kwargs=form.template_kwargs,
        allow_special_tokens=form.allow_special_tokens,
    )  # fmt: skip
    items = []
    for number, (question, row) in enumerate(zip(questions, built, strict=True)):
        if isinstance(row, BadRow):
            raise UserError(f"{question.where}: cannot be asked of {contender.name}: {row.reason}")
        example = row.examples[-1]
        items.append(HeldOut(*question.where, -1, number, *last_answer(example.ids, example.weights)))
    fits = [form.context is None or len(item.prompt_ids) + most <= form.context for item in items]
    notes = []
    if not all(fits):
        first = questions[fits.index(False)].where
        notes.append(
            f"{contender.name}: {fits.count(False):,} of {len(fits):,} prompts do not fit the model's context of {form.context:,} tokens with an "
            f"answer of {most:,}; they are not asked and count as answered with nothing. The first is that of {first}."
        )
    replaced = sum(has_system(question.conversation) for question in questions) if text is not None else 0
    if replaced:
        notes.append(f"{contender.name}: takes the place of the system prompt that {replaced:,} rows bring.")
    return Asked(items, shown, fits, notes)


def composed(question: Question, shots: Sequence[Question], system: str | None, chat: bool) -> Conversation:
    """Returns the conversation that is asked: the system prompt, the examples as earlier turns, the question with its answer.

    Without a template (`chat` False) examples are text in front of the prompt.
    """
    conversation = question.conversation if system is None else with_system(question.conversation, system)
    if not shots:
        return conversation
    before = [without_system(shot.conversation) for shot in shots]
    if not chat and conversation.kind == "completion" and all(shot.kind == "completion" for shot in before):
        texts = "".join(f"{shot.prompt}{shot.separator}{shot.completion.rstrip()}{GAP}" for shot in before)
        return replace(conversation, prompt=f"{texts}{conversation.prompt}")
    turns = [replace(message, given=True) for shot in before for message in shot.as_messages()]
    own = conversation.as_messages()
    head = next(place for place, message in enumerate(own) if message.role not in SYSTEM_ROLES)
    return replace(conversation, messages=(*own[:head], *turns, *own[head:]), prompt=None, completion=None, system=None, separator="")
