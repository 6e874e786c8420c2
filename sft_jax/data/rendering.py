"""A chat template with the run's arguments, and what is known about it with the run's tokenizer."""

import functools
from collections.abc import Sequence
from typing import Any

from sft_jax.data.locate import Doubtful, Located, Locator, Slot, slots_of
from sft_jax.data.templates import ChatTemplate
from sft_jax.data.tokens import Tokenizer
from sft_jax.data.turn_end import TurnEnd, find_turn_end

Messages = Sequence[dict[str, Any]]


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
        self._locator = Locator(self.render, doubtful)

    def render(self, messages: Messages, prompt: bool) -> str:
        """Returns the text of `messages`, ending with what asks for an answer where `prompt` is set."""
        return self.template.render(messages, prompt, **self._kwargs)

    def locate(self, messages: Messages, slots: Sequence[Slot], prompt: bool, text: str) -> Located | None:
        """Returns where the contents of `messages` lie in their render `text`; `slots` may go on beyond them."""
        count = len(messages)
        if slots and slots[-1].message >= count:
            slots = [slot for slot in slots if slot.message < count]
        return self._locator.locate(messages, slots, prompt, text)

    def render_neutral(self, messages: Messages, prompt: bool) -> str | None:
        """Returns what a template writes around contents of no meaning; None where it refuses them."""
        return self._locator.render_neutral(messages, slots_of(messages), prompt)

    @functools.cached_property
    def turn_end(self) -> TurnEnd:
        special = self._tokenizer.special_tokens
        return find_turn_end(self.render, self._locator, self._tokenizer.added_tokens, special.get("eos_token"))

    @property
    def bos(self) -> str:
        return self.template.special_tokens.get("bos_token", "")

    def close(self, shown: str) -> tuple[str, int]:
        """Returns a render that ends with an assistant turn, and where the end-of-turn of that turn ends in it.

        Where the template writes no end-of-turn there, the text that is returned has one.
        """
        end = self.turn_end
        if end.added and shown.endswith(end.after):
            text = shown[: len(shown) - len(end.after)] + end.end
            return text, len(text)
        if end.end and shown.endswith(end.end + end.after):
            return shown, len(shown) - len(end.after)
        return shown, len(shown.rstrip())
