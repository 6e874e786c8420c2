"""The tokens that `data.add_tokens` gives the tokenizer, and a model that has room for them."""

from collections.abc import Callable

from sft_jax.config import Config
from sft_jax.data.prepare import cache_folder
from sft_jax.data.stores.tokenizer_cache import open_tokenizer
from sft_jax.data.tokenizers.vocabulary import vocabulary_size
from sft_jax.hf.load import spec_of
from sft_jax.hf.source import Source
from sft_jax.training.adapting import tokenizer_place


def with_added_tokens(config: Config, source: Source, log: Callable[[str], None]) -> Source:
    """Returns the model with as many tokens as its tokenizer has with `data.add_tokens`; says which ids they have.

    Raises UserError where the tokenizer cannot be given them, or belongs to another model.
    """
    if not config.data.add_tokens:
        return source
    return source.with_vocab_size(size_with_added_tokens(config, spec_of(source).vocab_size, log))


def size_with_added_tokens(config: Config, size: int, log: Callable[[str], None]) -> int:
    """Returns as many tokens as a model of `size` has with `data.add_tokens`; says and raises as `with_added_tokens`."""
    tokens = config.data.add_tokens
    if not tokens:
        return size
    folder, cache = str(tokenizer_place(config)), cache_folder(config.data)
    before, _ = open_tokenizer(folder, cache)
    after, _ = open_tokenizer(folder, cache, tokens)
    new_size = vocabulary_size(after, size, folder)
    ids = [f"{text} is {after.added_tokens[text]}{' as before' if text in before.added_tokens else ''}" for text in tokens]
    room = f"has rows for them among its {size:,}"
    if new_size > size:
        room = f"goes from {size:,} to {new_size:,} tokens"
        room += ", of which new ones begin as the mean of all others" if config.model.init == "checkpoint" else ""
    log(f"data.add_tokens: {', '.join(ids)}. The model {room}.")
    return new_size
