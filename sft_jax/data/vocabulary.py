"""Whether the model has all tokens of the data: a tokenizer that is another model's would read past its embedding."""

from dataclasses import dataclass

from sft_jax.data.tokens import Tokenizer
from sft_jax.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model has."""

    size: int | None  # ids below it are the model's; None = unknown, every id is
    tokenizer: Tokenizer
    model_path: str  # for messages

    def check(self, largest_id: int, file: str, line: int) -> None:
        """Raises UserError where the model has not the token `largest_id`, which row `file`:`line` is the first to use."""
        if self.size is not None and largest_id >= self.size:
            raise UserError(
                f"{file}:{line}: token {self.tokenizer.decode([largest_id])!r} has the id {largest_id}, and the model "
                f"{self.model_path} has only the ids below {self.size} (vocab_size in its config.json): the tokenizer in "
                "its directory belongs to another model, or has tokens that the model was not enlarged for. Put the "
                "model's own tokenizer files there."
            )
