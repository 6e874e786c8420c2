"""A chat template with the run's arguments, and what is known about it with the run's tokenizer."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from sft_jax.data.chats.call_form import CallEnd, find_call_end, find_call_form
from sft_jax.data.chats.content_form import in_parts, takes_parts
from sft_jax.data.chats.locate import Doubtful, Located, Locator, Slot, slots_of
from sft_jax.data.chats.prefixes import Prefixes, find_prefixes
from sft_jax.data.chats.templates import ChatTemplate, message_dict
from sft_jax.data.chats.turn_end import TurnEnd, find_turn_end
from sft_jax.data.examples import RowError, excerpt
from sft_jax.data.formats.conversation import Message
from sft_jax.data.formats.tool_calls import CallForm
from sft_jax.data.tokenizers.tokens import Tokenizer

Messages = Sequence[dict[str, Any]]
_REMEMBERED = 256  # sets of tools and arguments that rows bring


class Rendering:
    """Renders conversations and finds their contents in the text."""

    def __init__(
        self,
        template: ChatTemplate,
        kwargs: dict[str, Any],
        tokenizer: Tokenizer,
        doubtful: Doubtful = lambda messages, slots: False,
    ):
        self.template = template
        self.name = template.name
        self._kwargs = kwargs
        self._tokenizer = tokenizer
        self._doubtful = doubtful
        self._locator = Locator(self.render, doubtful)
        self.checked_outside: dict[str, bool] = {}  # see sft_jax.data.chats.outside
        self._variants: dict[str, Rendering] = {}
        self._like: Rendering | None = None  # the same but for tools, which change neither the form of calls nor ends of turns

    def of(self, tools: Sequence[dict[str, Any]] | None, kwargs: dict[str, Any] | None) -> "Rendering":
        """Returns the rendering of a row that brings tools or template arguments; itself where it brings neither."""
        if not tools and not kwargs:
            return self
        key = json.dumps([tools, kwargs])  # templates write them in their order
        if key not in self._variants:
            if len(self._variants) >= _REMEMBERED:
                self._variants.clear()
            own = {**self._kwargs, **(kwargs or {}), **({"tools": list(tools)} if tools else {})}
            variant = Rendering(self.template, own, self._tokenizer, self._doubtful)
            variant._like = None if kwargs else self
            self._variants[key] = variant
        return self._variants[key]

    def dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Returns messages as the template reads them."""
        if not any(message.calls for message in messages):
            return [message_dict(message) for message in messages]
        form, reason = self.call_form
        if form is None:
            raise RowError(
                f"{self.name} shows no calls of tools ({reason}). {self._without_calls(messages)} Use another data.chat_template, "
                "or leave such rows out."
            )
        return [message_dict(message, form) for message in messages]

    def _without_calls(self, messages: Sequence[Message]) -> str:
        """Returns what to tell of a conversation whose calls the template does not show: the first of them, and the render."""
        dicts = [message_dict(message) for message in messages]
        turn = next(index for index, message in enumerate(messages) if message.calls)
        given = f"Given in message {turn}: {excerpt(json.dumps(dicts[turn]['tool_calls'], ensure_ascii=False))};"
        try:
            return f"{given} rendered: {excerpt(self.render(dicts[: turn + 1], False))}."
        except RowError:  # which is the reason that is told already
            return f"{given} nothing is rendered."

    def render(self, messages: Messages, prompt: bool) -> str:
        """Returns the text of `messages`, ending with what asks for an answer where `prompt` is set."""
        return self.template.render(in_parts(messages) if self.takes_parts else messages, prompt, **self._kwargs)

    def prefixes(self, messages: Messages, least: int, text: str) -> Prefixes | None:
        """Returns the renders of the first `least` and more of `messages`; None where their render `text` does not show them."""
        return find_prefixes(self.template, in_parts(messages) if self.takes_parts else messages, least, text, self._kwargs)

    def shows_same(self, messages: Messages, text: str) -> bool:
        """Returns whether the render of `messages` is `text`; it is not where the template refuses them."""
        try:
            return self.render(messages, False) == text
        except RowError:
            return False

    def locate(self, messages: Messages, slots: Sequence[Slot], prompt: bool, text: str) -> Located | None:
        """Returns where the contents of `messages` lie in their render `text`; `slots` may go on beyond them."""
        count = len(messages)
        if slots and slots[-1].message >= count:
            slots = [slot for slot in slots if slot.message < count]
        return self._locator.locate(messages, slots, prompt, text)

    def render_neutral(self, messages: Messages, prompt: bool) -> str | None:
        """Returns what a template writes around contents of no meaning; None where it refuses them."""
        return self._locator.render_neutral(messages, slots_of(messages), prompt)

    def generated(self, messages: Messages, text: str) -> list[tuple[int, int]] | None:
        """Returns what of `text`, the render of `messages`, stands in `{% generation %}`; None where there is no such block."""
        return self.template.generated(in_parts(messages) if self.takes_parts else messages, text, **self._kwargs)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template is given contents as lists of parts."""
        if self._like is not None:
            return self._like.takes_parts
        with self.template.probed():
            return takes_parts(lambda messages: self.template.render(messages, **self._kwargs))

    @functools.cached_property
    def turn_end(self) -> TurnEnd:
        """How turns end."""
        if self._like is not None and self._like.turn_end.end:  # some templates render nothing without tools
            return self._like.turn_end
        added, special = self._tokenizer.added_tokens, self._tokenizer.special_added_tokens
        eos = self._tokenizer.special_tokens.get("eos_token")
        with self.template.probed():
            return find_turn_end(self.render, self._locator, added, special, eos)

    @functools.cached_property
    def call_form(self) -> tuple[CallForm | None, str]:
        """How the template is given calls of tools; None and why where it shows them in no form."""
        if self._like is not None:
            return self._like.call_form
        with self.template.probed():
            return find_call_form(lambda messages, tools: self._render_with(tools, messages))

    def _render_with(self, tools: list[dict[str, Any]] | None, messages: Messages) -> str:
        return self.template.render(in_parts(messages) if self.takes_parts else messages, **{**self._kwargs, "tools": tools})

    @functools.cached_property
    def call_end(self) -> CallEnd:
        """How a turn of calls ends where it does not end as other turns do."""
        if self._like is not None:
            return self._like.call_end
        with self.template.probed():
            return find_call_end(self.render, self.call_form[0], self.turn_end, self._tokenizer.special_added_tokens)

    @property
    def bos(self) -> str:
        return self.template.special_tokens.get("bos_token", "")

    def close(self, shown: str, calls: bool) -> tuple[str, int]:
        """Returns a render that ends with an assistant turn, and where the end-of-turn of that turn ends in it.

        Where the template writes no end-of-turn there, the text that is returned has one. `calls`: the turn calls tools.
        """
        end = self.turn_end
        if end.end and not end.added and shown.endswith(end.end + end.after):
            return shown, len(shown) - len(end.after)
        after, added = self.call_end if calls else (end.after, end.end if end.added else "")
        if (calls or end.added) and shown.endswith(after):
            text = shown[: len(shown) - len(after)]
            return (text + added, len(text + added)) if added else (shown, len(text.rstrip()))
        return shown, len(shown.rstrip())
