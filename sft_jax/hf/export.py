"""An export is done when what was written has been read back and found to be the model."""

from collections.abc import Sequence
from pathlib import Path

from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.hf.merged import plain
from sft_jax.hf.save import save
from sft_jax.hf.source import Provenance
from sft_jax.hf.verify import ExportReport, verify_export
from sft_jax.hf.writer import MAX_SHARD_SIZE
from sft_jax.model.decoder import Decoder


def export_checkpoint(
    model: Decoder,
    tokenizer: Tokenizer | None,
    path: str | Path,
    *,
    stop_ids: Sequence[int] = (),
    dtype: str | None = None,
    provenance: Provenance | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> ExportReport:
    """Saves a model, adapters merged, reads it back, compares the two, and only then lets the directory appear at `path`.

    The arguments are those of `save`. Raises UserError as `save` does, and ExportMismatch, leaving nothing at `path`,
    where the directory is not the model.
    """
    model = plain(model)
    reports: list[ExportReport] = []

    def check(folder: Path) -> None:
        reports.append(verify_export(folder, model, tokenizer, stop_ids, dtype))

    save(
        model, tokenizer, path, stop_ids=stop_ids, dtype=dtype, provenance=provenance, max_shard_size=max_shard_size,
        overwrite=overwrite, check=check,
    )  # fmt: skip
    return reports[0]
