"""Whether the model has all tokens of the data: a tokenizer that is another model's would read past its embedding."""

from dataclasses import dataclass

from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model has."""

    size: int | None  # ids below it are the model's; None = unknown, every id is
    tokenizer: Tokenizer
    model_path: str  # for messages
    add_tokens: tuple[str, ...] = ()  # of `data.add_tokens`; how often each occurs is counted

    def check(self, largest_id: int, file: str, line: int) -> None:
        """Raises UserError where the model has not the token `largest_id`, which row `file`:`line` is the first to use."""
        if self.size is not None and largest_id >= self.size:
            text = self.tokenizer.decode([largest_id])
            where = (
                f"{file}:{line}: token {text!r} has the id {largest_id}, and the model {self.model_path} has only the ids "
                f"below {self.size} (vocab_size in its config.json): the tokenizer in its directory"
            )
            if not _ordinary_ids(self.tokenizer, self.size):
                raise UserError(
                    f"{where} has tokens that the model was not enlarged for. Name it in data.add_tokens, and the model "
                    "will be, for every token of the tokenizer."
                )
            raise UserError(f"{where} belongs to another model. Put the model's own tokenizer files there.")


def vocabulary_size(tokenizer: Tokenizer, size: int, model_path: str) -> int:
    """Returns how many tokens a model of `size` needs for all of a tokenizer to which tokens were added.

    It is enlarged for added tokens alone. Raises UserError where the tokenizer has other ids that the model lacks.
    """
    ordinary = _ordinary_ids(tokenizer, size)
    if ordinary:
        raise UserError(
            f"data.add_tokens: the tokenizer in {model_path} has {len(ordinary):,} ids from {ordinary[0]} on that are no added "
            f"tokens, and the model only those below {size}: it belongs to another model. Put the model's own tokenizer "
            "files there."
        )
    return max(size, tokenizer.vocab_size)


def _ordinary_ids(tokenizer: Tokenizer, size: int) -> list[int]:
    """Returns the ids from `size` on that are no added tokens."""
    added = set(tokenizer.added_tokens.values())
    return [token for token in range(size, tokenizer.vocab_size) if token not in added]
