"""Writes a run's newest checkpoint, or any model, as a Hugging Face directory, and compares what was written with it.

    python -m sft_jax.export --model RUN_OR_DIRECTORY [--out DIR] [--dtype float32|bfloat16|float16] [--overwrite]

Without --out the model of a run goes into RUN/export. Exit codes: 0 done, 2 wrong input.
"""

from pathlib import Path

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "The workdir of a run, a Hugging Face directory or a hub id.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; default: export in the workdir of the run.")
_DTYPE = flags.DEFINE_string("dtype", None, "Dtype of the parameters; default: that of the base model.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what is at --out.")


def main() -> None:
    if not _MODEL.value:
        raise UserError("--model: is missing; name the workdir of a run or a Hugging Face directory.")

    from sft_jax.evaluation.prompts import PromptReader, prompt_options_of
    from sft_jax.hf.export import export_checkpoint
    from sft_jax.hf.load import load
    from sft_jax.hf.progress import LoadProgress
    from sft_jax.hf.source import EXPORT, as_folder, is_run
    from sft_jax.versions import check_versions

    check_versions()
    folder = as_folder(_MODEL.value)
    if not _OUT.value and not is_run(folder):
        raise UserError(f"--out: is missing, and {folder} is not the workdir of a run; name the folder to write.")
    out = Path(_OUT.value) if _OUT.value else folder / EXPORT
    with LoadProgress(_MODEL.value) as progress:
        model, tokenizer = load(_MODEL.value, progress=progress)
    stop_ids = PromptReader(tokenizer, **prompt_options_of(_MODEL.value)).end_of_turn_ids() if tokenizer is not None else ()
    report = export_checkpoint(
        model, tokenizer, out, stop_ids=stop_ids, dtype=_DTYPE.value or model.source.dtype,
        overwrite=_OVERWRITE.value or not _OUT.value,
    )  # fmt: skip
    print(f"Wrote {out}: {report}.")


if __name__ == "__main__":
    cli.run(main, __doc__)
