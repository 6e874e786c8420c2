"""From the state of a run to a Hugging Face directory."""

from pathlib import Path

from flax import nnx

from sft_jax.config import Config
from sft_jax.data.prepare import PreparedData
from sft_jax.evaluation.prompts import PromptReader
from sft_jax.hf.export import export_checkpoint
from sft_jax.hf.source import Provenance, Source
from sft_jax.hf.verify import ExportReport
from sft_jax.training.state import TrainState


def export_state(
    state: TrainState, graphdef: nnx.GraphDef, config: Config, data: PreparedData, source: Source, path: Path, steps: int
) -> ExportReport:
    """Writes the model of `state` at `path`, replacing an earlier export, and compares what was written with it.

    Parameters are written in the dtype that config.json of the base names, so a bfloat16 base gives a bfloat16 export.
    """
    decoder = nnx.merge(graphdef, state.params, state.frozen)
    decoder.source = source
    reader = PromptReader(data.tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
    tokenizer = data.tokenizer if reader.template is None else data.tokenizer.with_chat_template(reader.template.source)
    return export_checkpoint(
        decoder, tokenizer, path, stop_ids=reader.end_of_turn_ids(), dtype=source.dtype, overwrite=True,
        provenance=Provenance(config.model.path, data.train.plan_hash, steps),
    )  # fmt: skip
