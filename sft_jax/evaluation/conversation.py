"""A conversation with a model, whose answers come as text piece by piece."""

from collections.abc import Iterator

from sft_jax.data.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.evaluation.generate import DecodingBatch
from sft_jax.evaluation.prompts import PromptReader, stop_ids_of
from sft_jax.evaluation.sampling import Sampling
from sft_jax.evaluation.text import TextStream
from sft_jax.model.decoder import Decoder


class ChatSession:
    """Remembers the turns. Without a chat template every text is continued for itself."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        chat_template: str = "auto",
        max_new_tokens: int = 512,
        options: Sampling,
        seed: int = 0,
    ):
        """Raises UserError for a system message without a chat template, and for no room for an answer."""
        self._model, self._tokenizer = model, tokenizer
        self._reader = PromptReader(tokenizer, chat_template)
        if system is not None and not self.is_chat:
            raise UserError("--system: the model has no chat template; name one with --chat_template, such as chatml.")
        if max_new_tokens < 1:
            raise UserError(f"--max_new_tokens: must be at least 1, not {max_new_tokens}.")
        self._system, self._max_new_tokens, self._options, self._seed = system, max_new_tokens, options, seed
        self._stop_ids = stop_ids_of(getattr(model, "source", None), tokenizer, self._reader)
        self._answers = 0
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

        Turn and answer are remembered when the answer ends, also when the caller ends it early by closing the iterator
        or by an interrupt; the answer is then what was yielded. A UserError leaves the conversation as it was.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        prompt = self._reader.ids(asked if self.is_chat else text, "the message")
        batch = DecodingBatch(
            self._model, [prompt], self._stop_ids, self._max_new_tokens, self._options, self._seed, [self._answers]
        )
        self._answers += 1
        stream = TextStream(self._tokenizer, prompt)
        pieces: list[str] = []

        def note(piece: str) -> str:
            pieces.append(piece)
            return piece

        try:
            seen = 0
            while True:
                ids = batch.answers()[0].ids
                if piece := stream.push(ids[seen:]):
                    yield note(piece)
                seen = len(ids)
                if not batch.running:
                    break
                batch.advance(1)
            if piece := stream.finish():
                yield note(piece)
        finally:
            if self.is_chat:
                self.turns = [*asked, {"role": "assistant", "content": "".join(pieces)}]
