"""From a prompt, text or chat, to the token ids that the model was trained to continue, and the ids that end an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_jax.data.examples import RowError
from sft_jax.data.templates import ChatTemplate, resolve_template
from sft_jax.data.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.hf.source import Source

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray

_CONTENT = "\ue000content\ue000"  # private use: no template writes it


class PromptReader:
    """Turns prompts into ids as inference feeds them."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str = "auto", chat_template_kwargs: Mapping[str, Any] | None = None
    ):
        """`chat_template` is "auto" (the model's own), "none", a built-in name or a file."""
        self.tokenizer = tokenizer
        self.template: ChatTemplate | None = resolve_template(chat_template, tokenizer)
        self.kwargs = dict(chat_template_kwargs or {})

    def ids(self, prompt: Prompt, where: str = "prompt") -> list[int]:
        """Returns the ids of a text, of chat messages or of ids; `where` names the prompt in a UserError."""
        if isinstance(prompt, str):
            ids = [*self.tokenizer.plain_prefix, *self.tokenizer.encode(prompt)]
        elif isinstance(prompt, np.ndarray) or (isinstance(prompt, Sequence) and all(_is_id(item) for item in prompt)):
            ids = [int(item) for item in prompt]
        elif isinstance(prompt, Sequence) and all(isinstance(item, Mapping) for item in prompt):
            ids = self.chat_ids(prompt, where)
        else:
            raise UserError(f"{where}: must be a text, a list of chat messages or a list of token ids.")
        if not ids:
            raise UserError(f"{where}: has no tokens, so there is nothing to go on from; give it some text.")
        return ids

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], where: str = "prompt") -> list[int]:
        """Returns the ids of a conversation up to where the assistant's answer begins."""
        if self.template is None:
            raise UserError(
                f"{where}: is a chat, but the model has no chat template; give a text, or name a template "
                "(chat_template='chatml', say)."
            )
        for number, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise UserError(f"{where}: message {number} has no 'role'; write {{'role': 'user', 'content': ...}}.")
        try:
            return self.tokenizer.encode(self.template.render(messages, add_generation_prompt=True, **self.kwargs))
        except RowError as error:
            raise UserError(f"{where}: {error}") from error

    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Returns the id of the token with which the template ends an answer, () where it ends with plain text."""
        if self.template is None:
            return ()
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _CONTENT}]
        try:
            text = self.template.render(messages, **self.kwargs)
        except RowError:  # a template that wants more than a question and an answer
            return ()
        _, found, tail = text.rpartition(_CONTENT)
        added = set(self.tokenizer.added_tokens.values())
        return tuple([i for i in self.tokenizer.encode(tail) if i in added][:1]) if found else ()


def stop_ids_of(source: Source | None, tokenizer: Tokenizer, reader: PromptReader) -> tuple[int, ...]:
    """Returns the ids that end an answer, ascending.

    `source` is where the model was read from, None for one that was not. The ids are those of the model's generation configuration, as servers stop on them, the tokenizer's EOS, and the end
    of turn of the chat template.
    """
    listed = source.generation_dict().get("eos_token_id") if source is not None else None
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return tuple(sorted({int(i) for i in (*listed, *eos, *reader.end_of_turn_ids())}))


def _is_id(item: Any) -> bool:
    return isinstance(item, (int, np.integer)) and not isinstance(item, bool)
