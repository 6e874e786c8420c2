"""The configuration of a run with all that its model decides, and what preparing data needs of the model."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.hf.files import CONFIG
from sft_jax.hf.hub import download
from sft_jax.hf.load import spec_of
from sft_jax.hf.restore import model_source
from sft_jax.hf.source import added_tokens_of, as_folder, chat_template_of, has_tokenizer, is_hub_id, lasting_path
from sft_jax.training.adapting import has_own_tokenizer, tokenizer_place
from sft_jax.training.vocabulary import size_with_added_tokens


def resolved(config: Config) -> Config:
    """Returns the configuration as it is recorded: the base wherever the run is used from; an earlier run's template and tokens."""
    model = dataclasses.replace(config.model, path=lasting_path(config.model.path))
    adapter = dataclasses.replace(config.adapter, path=lasting_path(config.adapter.path) if config.adapter.path else "")
    data = config.data
    if data.chat_template == "auto" and not has_own_tokenizer(adapter.path):
        data = dataclasses.replace(data, chat_template=chat_template_of(model.path))
    tokens = dict.fromkeys((*added_tokens_of(model.path), *data.add_tokens))
    data = dataclasses.replace(data, add_tokens=tuple(tokens))
    return dataclasses.replace(config, model=model, adapter=adapter, data=data)


class DataModel(NamedTuple):
    """What data are prepared for."""

    config: Config  # resolved
    tokenizer: str  # folder of the tokenizer
    vocab_size: int | None  # tokens that the model has; None where there is none to check the data against


def data_model(config: Config, log: Callable[[str], None]) -> DataModel:
    """Returns what preparing needs of a model, which needs no weights, and no config.json beside a tokenizer either.

    A model that cannot be trained here, such as one of an unknown architecture, is told to `log` and its tokenizer taken.
    Of a hub id the weights are not downloaded. Raises UserError where there is neither a model nor a tokenizer.
    """
    folder = as_folder(config.model.path)
    if not folder.is_dir() and is_hub_id(config.model.path):
        folder = download(config.model.path, weights=False)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))
    if folder.is_dir() and has_tokenizer(folder) and not (folder / CONFIG).is_file() and not config.adapter.path:
        return DataModel(config, str(folder), None)
    config = resolved(config)
    source = model_source(config.model.path)
    try:
        size = spec_of(source).vocab_size
    except UserError as error:
        log(f"{error} Only its tokenizer is needed here; train will refuse the model.")
        size = source.vocab_size
    if size is not None:
        size = size_with_added_tokens(config, size, log)
    return DataModel(config, str(tokenizer_place(config)), size)
