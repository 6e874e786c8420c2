"""From the state of a run to a Hugging Face directory."""

from pathlib import Path

from flax import nnx

from sft_jax.config import Config
from sft_jax.data.chats.template_defaults import with_defaults
from sft_jax.data.prepare import PreparedData
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.evaluation.prompts import PromptReader
from sft_jax.hf.export import export_checkpoint
from sft_jax.hf.peft.save import AdapterReport, save_adapter
from sft_jax.hf.source import Provenance, Source
from sft_jax.hf.verify import ExportReport
from sft_jax.training.state import TrainState


def export_adapter(
    state: TrainState, graphdef: nnx.GraphDef, config: Config, data: PreparedData, source: Source, path: Path, steps: int
) -> AdapterReport:
    """Writes the adapters of `state` as a directory of PEFT at `path`, replacing an earlier one, and compares them."""
    decoder = nnx.merge(graphdef, state.params, state.frozen)
    decoder.source = source
    provenance = Provenance(config.model.path, data.train.plan_hash, steps, source.fingerprint, config.adapter.base_dtype)
    return save_adapter(decoder, _tokenizer(config, data)[0], path, provenance, overwrite=True)


def export_state(
    state: TrainState, graphdef: nnx.GraphDef, config: Config, data: PreparedData, source: Source, path: Path, steps: int
) -> ExportReport:
    """Writes the model of `state` at `path`, replacing an earlier export, and compares what was written with it.

    Parameters are written in the dtype that config.json of the base names, so a bfloat16 base gives a bfloat16 export.
    """
    decoder = nnx.merge(graphdef, state.params, state.frozen)
    decoder.source = source
    tokenizer, reader = _tokenizer(config, data)
    return export_checkpoint(
        decoder, tokenizer, path, stop_ids=reader.end_of_turn_ids(), dtype=source.dtype, overwrite=True,
        provenance=Provenance(config.model.path, data.train.plan_hash, steps),
    )  # fmt: skip


def _tokenizer(config: Config, data: PreparedData) -> tuple[Tokenizer, PromptReader]:
    """Returns the tokenizer with the chat template that the run was trained with, its arguments as defaults, and what reads prompts with it."""
    kwargs = config.data.chat_template_kwargs
    reader = PromptReader(data.tokenizer, config.data.chat_template, kwargs)
    return (data.tokenizer if reader.template is None else data.tokenizer.with_chat_template(with_defaults(reader.template, kwargs))), reader
