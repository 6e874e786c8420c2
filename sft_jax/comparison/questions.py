"""The rows of a comparison: held-out ones that are scored, and training rows that examples are taken from.

What is read here is the same for every contender; no tokenizer and no template is involved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sft_jax.config import DataConfig
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import Conversation, Message
from sft_jax.data.formats.registry import FORMATS
from sft_jax.data.randomness import derive_key, permutation
from sft_jax.data.sources.registry import Where
from sft_jax.doctor.collection import Collection, open_collection
from sft_jax.doctor.texts import key_of, texts_of
from sft_jax.errors import UserError, did_you_mean

Log = Callable[[str], None]
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Question:
    """A row whose last answer is asked for."""

    where: Where
    conversation: Conversation  # ends with the answer, the only message that is none of the prompt
    row: dict[str, Any]  # with all its columns
    asked: str  # what the user says last, for search and for people
    key: int  # of everything before the answer but system prompts, whatever its case and white space

    @property
    def brings_tools(self) -> bool:
        """Whether it has tools or calls of them, which make no sense beside another question."""
        messages = self.conversation.messages or ()
        return bool(self.conversation.tools) or any(message.calls or message.role == "tool" for message in messages)


@dataclass(frozen=True)
class Questions:
    """What is asked, and what may be shown as an example."""

    scored: tuple[Question, ...]  # in the order of the files
    validation: tuple[Question, ...]  # training rows on which numbers of examples are chosen; never shown, never scored
    pool: tuple[Question, ...]  # training rows that may be shown, in the order in which they are drawn
    set_name: str
    notes: tuple[str, ...]


def read_questions(
    data: DataConfig, *, set_name: str, count: int | None, validation: int, pool: int, seed: int, log: Log
) -> Questions:
    """Reads the rows of a held-out set, and of `data.train` what examples need.

    Args:
        set_name: of data.eval; "" where there is one only.
        count: held-out rows that are scored, drawn by `seed`; None = all.
        validation: training rows on which numbers of examples are chosen; 0 = none are needed.
        pool: training rows that may be shown, at most; 0 = none are needed.

    A training row with the prompt of a scored row is neither shown nor chosen on. Raises UserError naming the key or the row.
    """
    item = _set_named(data, set_name)
    if pool and not data.train:
        raise UserError(
            "data.train: is empty, and examples are taken from there; name a file of training rows, or leave out --shots and --retrieve."
        )
    rows = open_collection(replace(data, eval=(item,), train=data.train if pool else ()), (), log)
    skip, notes = data.bad_rows == "skip", []
    size = int(rows.bases[1])
    chosen = np.sort(permutation(derive_key(seed, "held-out answers"), size)[:count]).tolist()
    scored = _read(rows, chosen, skip, notes, "held-out")
    if not scored:
        raise UserError(f"{rows.sets[0].key}: none of its {len(chosen):,} rows can be used; correct them.")
    if not pool:
        return Questions(tuple(scored), (), (), item.name, tuple(notes))
    drawn = size + permutation(derive_key(seed, "examples in prompts"), len(rows) - size)
    taken = drawn[: pool + validation]
    found = {question.where: question for question in _read(rows, np.sort(taken).tolist(), skip, notes, "training")}
    in_order = [found[where] for where in map(rows.where, taken.tolist()) if where in found]
    return Questions(tuple(scored), *_parted(scored, in_order, validation, notes), item.name, tuple(notes))


def _set_named(data: DataConfig, name: str):
    if not data.eval:
        raise UserError(
            "data.eval: is empty, so there is nothing to compare on; name a file of held-out rows, such as --config.data.eval=held_out.jsonl."
        )
    known = [item.name for item in data.eval]
    if not name and len(known) > 1:
        raise UserError(f"--set: is missing, and data.eval has several sets; name one of {', '.join(known)}.")
    if name and name not in known:
        raise UserError(f"--set: there is no held-out set '{name}'; {did_you_mean(name, known)}.")
    return data.eval[known.index(name) if name else 0]


def _read(rows: Collection, numbers: Sequence[int], skip: bool, notes: list[str], what: str) -> list[Question]:
    """Returns the questions in some rows, in their order. Those that cannot be used raise UserError, or are counted."""
    found, bad = [], []
    for number in numbers:
        item = rows.set_of(number)
        try:
            row = rows.row(number)
            found.append(question_of(FORMATS[item.format].read(row, item.columns), row, rows.where(number)))
        except RowError as error:
            if not skip:
                raise UserError(f"{rows.where(number)}: {error} Correct the row, or leave such rows out with data.bad_rows=skip.") from error
            bad.append(f"{rows.where(number)}: {error}")
    if bad:
        notes.append(f"{len(bad):,} {what} rows cannot be used and are left out (data.bad_rows=skip), the first one: {bad[0]}")
    return found


def question_of(conversation: Conversation, row: dict[str, Any], where: Where) -> Question:
    """Returns the question in a row: its last answer that training would be on, and what stands before. Raises RowError."""
    if conversation.kind in ("text", "tokens"):
        raise RowError("it has no answer to compare with; a comparison needs chats, or prompts with completions.")
    if conversation.kind == "chat":
        messages = conversation.messages
        answered = (message.role == "assistant" and not message.given and message.weight != 0 for message in messages)
        answers = [place for place, holds in enumerate(answered) if holds]
        if not answers or answers[-1] == 0:
            raise RowError("it has no answer to a prompt that training would be on.")
        last = answers[-1]
        prompt = (replace(message, weight=None, pieces=(), given=True) for message in messages[:last])
        conversation = replace(conversation, messages=(*prompt, replace(messages[last], weight=None, pieces=())))
    texts = texts_of(conversation)
    return Question(where, conversation, row, texts.question or texts.prompt, key_of(" ".join(texts.prompt.casefold().split())))


def _parted(
    scored: Sequence[Question], drawn: Sequence[Question], validation: int, notes: list[str]
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Returns (what is chosen on, what may be shown) of training rows: no prompt is in two parts, and none of them is scored."""
    taken = {question.key for question in scored}
    same = sum(question.key in taken for question in drawn)
    if same:
        notes.append(f"{same:,} training rows have the prompt of a scored row and are not shown as examples.")
    tools = sum(question.brings_tools for question in drawn)
    if tools:
        notes.append(f"{tools:,} training rows bring tools or calls of tools and are not shown as examples.")
    parts: tuple[list[Question], list[Question]] = ([], [])
    for question in drawn:
        if question.key not in taken:
            part = parts[len(parts[0]) >= validation]
            if part is parts[1] and question.brings_tools:
                continue
            taken.add(question.key)
            part.append(question)
    if not parts[1]:
        raise UserError(
            "data.train: has no row that could be shown as an example; name other training rows, or leave out --shots and --retrieve."
        )
    return tuple(parts[0]), tuple(parts[1])


def without_system(conversation: Conversation) -> Conversation:
    """Returns a conversation without its system prompt."""
    if conversation.messages is None:
        return replace(conversation, system=None)
    return replace(conversation, messages=tuple(message for message in conversation.messages if message.role not in SYSTEM_ROLES))


def with_system(conversation: Conversation, text: str) -> Conversation:
    """Returns a conversation with another system prompt in the place of its own."""
    plain = without_system(conversation)
    if plain.messages is None:
        return replace(plain, system=text)
    return replace(plain, messages=(Message("system", text, given=True), *plain.messages))


def has_system(conversation: Conversation) -> bool:
    """Returns whether a row brings a system prompt."""
    return without_system(conversation) != conversation
