"""Conversation: what a row says, whatever format it came in."""

from dataclasses import dataclass
from typing import Any, Literal

from sft_jax.config_checks import ROLES
from sft_jax.data.tool_calls import Call

__all__ = ["ROLES", "Conversation", "Message"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str  # one of ROLES
    content: str
    weight: float | None = None  # of its tokens in the loss; it wins over what the run supervises, None = as the run does
    reasoning: str | None = None  # what an assistant thought before the content, for templates that render it
    given: bool = False  # part of a prompt, so no answer even where it is the assistant's
    calls: tuple[Call, ...] = ()  # of tools, by an assistant
    call_id: str | None = None  # of the call that a tool's message answers
    name: str | None = None  # of the tool


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, a prompt with its completion, or plain text: exactly one of the three.

    A system prompt that the row brings in a field of its own is the first message of a chat; with a prompt it stands in
    `system`.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    system: str | None = None  # with a prompt only
    tools: tuple[dict[str, Any], ...] | None = None  # that the assistant may call, in OpenAI's form
    template_kwargs: dict[str, Any] | None = None  # template arguments of the row; they win over the run's
    separator: str = ""  # ends the prompt where no template does, so that it does not run into the completion

    @property
    def kind(self) -> Literal["chat", "completion", "text"]:
        """Returns which of the three it is."""
        if self.messages is not None:
            return "chat"
        return "completion" if self.completion is not None else "text"
