"""Conversation: what a row says, whatever format it came in."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from sft_jax.config_checks import ROLES
from sft_jax.data.formats.tool_calls import Call

__all__ = ["ROLES", "Conversation", "Message", "Piece"]


class Piece(NamedTuple):
    """Characters of a text that have a weight of their own."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str  # one of ROLES
    content: str
    weight: float | None = None  # of its tokens in the loss; it wins over what the run supervises, None = as the run does
    reasoning: str | None = None  # what an assistant thought before the content, for templates that render it
    given: bool = False  # part of a prompt, so no answer even where it is the assistant's
    pieces: tuple[Piece, ...] = ()  # of the content; they win over `weight`
    calls: tuple[Call, ...] = ()  # of tools, by an assistant
    call_id: str | None = None  # of the call that a tool's message answers
    name: str | None = None  # of the tool


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, a prompt with its completion, plain text, or token ids: exactly one of the four.

    A system prompt that the row brings in a field of its own is the first message of a chat; with a prompt it stands in
    `system`.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    ids: np.ndarray | None = field(default=None, compare=False)  # int32 [n]: tokens that the data bring
    weights: np.ndarray | None = field(default=None, compare=False)  # float32 [n], of `ids` as targets
    pieces: tuple[Piece, ...] = ()  # of `text`
    system: str | None = None  # with a prompt only
    tools: tuple[dict[str, Any], ...] | None = None  # that the assistant may call, in OpenAI's form
    template_kwargs: dict[str, Any] | None = None  # template arguments of the row; they win over the run's
    separator: str = ""  # ends the prompt where no template does, so that it does not run into the completion

    def as_messages(self) -> tuple[Message, ...]:
        """Returns the turns of a chat, or of a prompt with its completion: the prompt is the user's, the completion the assistant's."""
        if self.messages is not None:
            return self.messages
        system = (Message("system", self.system),) if self.system else ()
        return (*system, Message("user", self.prompt), Message("assistant", self.completion))

    @property
    def kind(self) -> Literal["chat", "completion", "text", "tokens"]:
        """Returns which of the four it is."""
        if self.ids is not None:
            return "tokens"
        if self.messages is not None:
            return "chat"
        return "completion" if self.completion is not None else "text"
