"""From a prompt, text or chat, to the ids that the model was trained to continue, and the ids that end an answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.config_checks import check_template_arguments
from sft_jax.data.chats.guard import guard_of
from sft_jax.data.chats.locate import slots_of
from sft_jax.data.chats.outside import check_outside
from sft_jax.data.chats.rendering import Rendering
from sft_jax.data.chats.templates import resolve_template
from sft_jax.data.chats.text_plans import TextPlan
from sft_jax.data.examples import RowError
from sft_jax.data.formats.conversation import Conversation
from sft_jax.data.formats.messages import read_message
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.hf.source import Source, is_run, run_config

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray


class PromptReader:
    """Turns prompts into ids, the same that the model saw before its answers in training."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
    ):
        """Prepares to read prompts for `tokenizer`.

        Args:
            chat_template: "auto" (the model's own), "none", a built-in name or a file.
            chat_template_kwargs: arguments of the template, such as {"enable_thinking": False}.
            allow_special_tokens: let the content of messages become control tokens. Otherwise `<|im_end|>` in a message
                is text, as it was in training.
        """
        self.tokenizer = tokenizer
        self.template = resolve_template(chat_template, tokenizer)  # None: chats are refused
        kwargs = dict(chat_template_kwargs or {})
        check_template_arguments("chat_template_kwargs", kwargs)
        self._guard = None if allow_special_tokens else guard_of(tokenizer)
        doubtful = (self._guard.doubtful,) if self._guard else ()
        self._rendering = Rendering(self.template, kwargs, tokenizer, *doubtful) if self.template else None

    def ids(self, prompt: Prompt, where: str = "prompt") -> list[int]:
        """Returns the ids of a text, of chat messages or of ids; `where` names the prompt in a UserError."""
        if isinstance(prompt, str):
            ids = [*self.tokenizer.plain_prefix, *self.tokenizer.encode(prompt)]
        elif isinstance(prompt, (Sequence, np.ndarray)) and all(_is_id(item) for item in prompt):
            ids = [int(item) for item in prompt]
        elif isinstance(prompt, Sequence) and all(isinstance(item, Mapping) for item in prompt):
            ids = self._chat_ids(prompt, where)
        else:
            raise UserError(f"{where}: must be a text, a list of chat messages or a list of token ids.")
        if not ids:
            raise UserError(f"{where}: has no tokens, so there is nothing to go on from; give it some text.")
        return ids

    def _chat_ids(self, chat: Sequence[Mapping[str, Any]], where: str) -> list[int]:
        """Returns the ids of a conversation up to where the assistant's answer begins."""
        if self._rendering is None:
            raise UserError(
                f"{where}: is a chat, but the model has no chat template; give a text, or name one such as chatml."
            )
        try:
            messages = [read_message(message, f"message {number}") for number, message in enumerate(chat)]
            dicts = self._rendering.dicts(messages)
            text = self._rendering.render(dicts, True)
            if self._guard is not None:
                check_outside(Conversation(messages=tuple(messages)), self._rendering, self._guard)
            (encoding,) = self.tokenizer.encode_with_offsets([text])
            if self._guard is not None:
                located = self._rendering.locate(dicts, slots_of(dicts), True, text)
                plan = TextPlan(text, [], roles=tuple(message.role for message in messages), complete=False)
                if located is not None:
                    plan.regions, plan.complete = located.regions, located.complete
                if not plan.complete:
                    plan.neutral = self._rendering.render_neutral(dicts, True)
                if self._guard.needed(messages) or self._guard.leaks([plan], [encoding]):
                    (encoding,) = self._guard.encoder.encode([self._guard.rewrite(plan).text])
            return encoding.ids.tolist()
        except RowError as error:
            raise UserError(f"{where}: {error}") from error

    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Returns the token with which the template ends an answer, or nothing where that is no token of its own."""
        if self._rendering is None:
            return ()
        ids = self.tokenizer.encode(self._rendering.turn_end.end)
        return (ids[-1],) if ids and ids[-1] in self.tokenizer.added_tokens.values() else ()


def prompt_options_of(path: str | Path) -> dict[str, Any]:
    """Returns the arguments of PromptReader that the run at `path` was trained with; none for what is no run.

    A model answers in the form that it was trained in only if it is asked in that form.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() or not is_run(folder):
        return {}
    data = run_config(folder)["data"]
    return {
        "chat_template_kwargs": dict(data.get("chat_template_kwargs") or {}),
        "allow_special_tokens": bool(data.get("allow_special_tokens_in_content")),
    }


def stop_ids_of(source: Source | None, tokenizer: Tokenizer, reader: PromptReader) -> tuple[int, ...]:
    """Returns the ids that end an answer, ascending.

    `source` is where the model was read from, None for one that was not. The ids are those of the model's generation
    configuration, on which servers stop, the tokenizer's EOS, and the end of turn of the chat template.
    """
    listed = () if source is None else source.stop_ids()
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return tuple(sorted({*listed, *eos, *reader.end_of_turn_ids()}))


def _is_id(item: Any) -> bool:
    return isinstance(item, (int, np.integer)) and not isinstance(item, bool)
