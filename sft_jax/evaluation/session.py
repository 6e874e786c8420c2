"""A chat with a model, whose answers come as text piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.prompts import PromptReader, stop_ids_of
from sft_jax.evaluation.sampling import Sampling, sampling
from sft_jax.evaluation.slots import NumberedPrompt, Slots
from sft_jax.evaluation.text import TextStream, TextUntilStop
from sft_jax.model.decoder import Decoder

_GREEDY = sampling()


class ChatSession:
    """Remembers the turns. Without a chat template every text is continued for itself.

    Attributes:
        turns: the messages so far.
        finished: whether the model ended its last answer itself.
        context: tokens of prompt and answer, at most: `max_position_embeddings` of the model; None = unlimited.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        chat_template: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens: bool = False,
        max_new_tokens: int = 512,
        options: Sampling = _GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
    ):
        """`stop` are texts that end an answer, and are not part of it.

        Raises UserError for a system message without a chat template, and where an answer may have no tokens.
        """
        self._model, self._tokenizer = model, tokenizer
        self._reader = PromptReader(tokenizer, chat_template, chat_template_kwargs, allow_special_tokens)
        if system is not None and not self.is_chat:
            raise UserError("system: the model has no chat template for it; name one in chat_template, such as chatml.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: must be at least 1, not {max_new_tokens}.")
        source = getattr(model, "source", None)  # only a model that was read from a directory has one
        self._stop_ids = stop_ids_of(source, tokenizer, self._reader)
        self.context: int | None = None if source is None else source.config_dict().get("max_position_embeddings")
        self._system, self._max_new_tokens, self._options, self._seed = system, max_new_tokens, options, seed
        self._stop = tuple(stop)
        self._answers = 0
        self.finished = True
        self.clear()

    @property
    def is_chat(self) -> bool:
        """Whether turns go through a chat template."""
        return self._reader.template is not None

    def clear(self) -> None:
        """Forgets the turns but the system message."""
        self.turns = [{"role": "system", "content": self._system}] if self._system is not None else []

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to `text` in pieces of whole characters.

        Text and answer are remembered once the answer has begun; of one that the caller ends early, by closing the
        iterator or by an interrupt, what was yielded. Raises UserError, and leaves the chat as it was, for a message
        that the template refuses and where the context is full.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        prompt = self._reader.ids(asked if self.is_chat else text, "the message")
        limit = self._max_new_tokens if self.context is None else min(self._max_new_tokens, self.context - len(prompt))
        if limit < 1:
            raise UserError(
                f"the message: the chat has {len(prompt)} tokens with it, and the model's context is {self.context}; "
                "begin anew or write less."
            )
        slots = Slots(self._model, 1, len(prompt), self._stop_ids, limit, self._options, self._seed)
        slots.fill({0: NumberedPrompt(prompt, self._answers)})
        self._answers += 1
        self.finished = False
        stream = TextStream(self._tokenizer, prompt)
        until, given, seen = TextUntilStop(self._stop), "", 0
        try:
            while True:
                (answer,), running = slots.answers([0]), not slots.done()[0]
                self.finished = answer.finished
                piece = until.push(stream.push(answer.ids[seen:]))
                seen = len(answer.ids)
                if not running and not until.stopped:
                    piece += until.push(stream.finish())
                    piece += until.finish()
                if until.stopped:
                    self.finished, running = True, False
                if piece:
                    given += piece
                    yield piece
                if not running:
                    return
                slots.advance(1)
        finally:
            if self.is_chat:
                self.turns = [*asked, {"role": "assistant", "content": given}]
