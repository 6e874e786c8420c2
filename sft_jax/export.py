"""Writes a run's newest checkpoint, or any model, as a Hugging Face directory, and compares what was written with it.

    python -m sft_jax.export --model RUN_OR_DIRECTORY [--out DIR] [--dtype float32|bfloat16|float16] [--overwrite]
    python -m sft_jax.export --model RUN_OR_ADAPTER --adapter [--base DIR] [--out DIR] [--overwrite]
    python -m sft_jax.export --model RUN_OR_ADAPTER --merge [--base DIR] [--out DIR] [--dtype ...] [--overwrite]

Of a run that trained adapters, or a directory of PEFT, --adapter writes the adapter as such a directory, and --merge the
whole model with the adapter in it. Without --out a model goes into RUN/export, and an adapter into RUN/adapter. Exit codes:
0 done, 2 wrong input.
"""

from pathlib import Path

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "The workdir of a run, a Hugging Face directory or a hub id.")
_ADAPTER = flags.DEFINE_bool("adapter", False, "Write the adapter alone, as a directory that peft loads.")
_MERGE = flags.DEFINE_bool("merge", False, "Write the model with its adapter merged into it.")
_BASE = flags.DEFINE_string("base", None, "The base of an adapter, where it is not where the adapter says.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; default: export, or adapter, in the workdir of the run.")
_DTYPE = flags.DEFINE_string("dtype", None, "Dtype of the parameters; default: that of the base model.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what is at --out.")


def main() -> None:
    if not _MODEL.value:
        raise UserError("--model: is missing; name the workdir of a run or a Hugging Face directory.")

    from sft_jax.evaluation.prompts import PromptReader, prompt_options_of
    from sft_jax.hf.export import export_checkpoint
    from sft_jax.hf.load import load
    from sft_jax.hf.peft.save import save_adapter
    from sft_jax.hf.progress import LoadProgress
    from sft_jax.hf.source import ADAPTER, EXPORT, as_folder, has_adapter, is_run
    from sft_jax.training.platform import set_up_platform
    from sft_jax.versions import check_versions

    check_versions()
    folder = as_folder(_MODEL.value)
    if _ADAPTER.value and (_MERGE.value or _DTYPE.value):
        raise UserError(f"--adapter: is written as it was trained, without --{'merge' if _MERGE.value else 'dtype'}; leave one of them out.")
    if not _OUT.value and not is_run(folder):
        raise UserError(f"--out: is missing, and {folder} is not the workdir of a run; name the folder to write.")
    out = Path(_OUT.value) if _OUT.value else folder / (ADAPTER if _ADAPTER.value else EXPORT)
    overwrite = _OVERWRITE.value or not _OUT.value
    if _ADAPTER.value or _MERGE.value:
        if not has_adapter(folder):
            asked = "adapter" if _ADAPTER.value else "merge"
            raise UserError(f"--{asked}: {_MODEL.value} has no adapter; leave --{asked} out to write the model.")
    elif has_adapter(folder):
        raise UserError(
            f"--model: {_MODEL.value} has an adapter; say --adapter to write it as a directory that peft loads, or --merge to write "
            "the whole model."
        )
    set_up_platform(deterministic=False)
    with LoadProgress(_MODEL.value) as progress:
        model, tokenizer = load(_MODEL.value, progress=progress, base=_BASE.value)
    if _ADAPTER.value:
        print(f"Wrote {out}: {save_adapter(model, tokenizer, out, model.source.provenance, overwrite)}.")
        return
    stop_ids = PromptReader(tokenizer, **prompt_options_of(_MODEL.value)).end_of_turn_ids() if tokenizer is not None else ()
    report = export_checkpoint(
        model, tokenizer, out, stop_ids=stop_ids, dtype=_DTYPE.value or model.source.dtype,
        overwrite=overwrite,
    )  # fmt: skip
    print(f"Wrote {out}: {report}.")


if __name__ == "__main__":
    cli.run(main, __doc__)
