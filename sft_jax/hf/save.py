"""Writing a decoder as a Hugging Face directory: the names and bytes that loading read, one tensor at a time."""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

import sft_jax
from sft_jax.checkpoint.processes import agree
from sft_jax.data.tokenizers.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.hf.files import TensorDirectory
from sft_jax.hf.gather import Tensors, carried_tensors
from sft_jax.hf.merged import plain
from sft_jax.hf.source import CONFIG, GENERATION_CONFIG, PARAM_DTYPES, PROVENANCE, Provenance, Source
from sft_jax.hf.writer import (
    MAX_SHARD_SIZE,
    TensorSpec,
    new_directory,
    partial_path,
    to_json,
    write_order,
    write_tensors,
    write_text,
)
from sft_jax.model.decoder import Decoder

_DTYPE_NAMES = {"dtype", "torch_dtype"}  # in config.json: of transformers 5, and earlier


def save(
    model: Decoder,
    tokenizer: Tokenizer | None,
    path: str | Path,
    *,
    stop_ids: Sequence[int] = (),
    dtype: str | None = None,
    provenance: Provenance | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `model` and `tokenizer` as a Hugging Face directory at `path`, all or nothing, and returns the path.

    Adapters are merged into the kernels. `dtype` None writes every parameter in the dtype it has. `stop_ids`, such as the
    chat template's end of turn, join the model's own in generation_config.json. `provenance`, by default that of what the
    model was loaded from, is written into README.md and sft_jax.json. Tensors go into files of at most `max_shard_size`
    bytes. `overwrite` replaces an earlier export. `check`, called with the written directory before it appears at `path`,
    may refuse it by raising. Of several processes all must call this; the first one writes.

    Raises UserError where `path` is taken or cannot be written, the disk is full, or the model has no source.
    """
    path = Path(path).expanduser()
    path = path.parent.resolve() / path.name
    source = getattr(model, "source", None)
    if source is None:
        raise UserError(
            "The model does not say where its config.json came from; save a model that `load` or `fit` returned."
        )
    if dtype is not None and dtype not in PARAM_DTYPES:
        raise UserError(f"dtype: must be one of {', '.join(PARAM_DTYPES)}, not '{dtype}'.")
    provenance = provenance or source.provenance or Provenance(source.name)
    model = plain(model)
    tensors, carried = Tensors(model, dtype), agree(lambda: carried_tensors(model))
    size = tensors.nbytes + sum(info.nbytes for info in carried.tensors.values())
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        folder = agree(
            lambda: stack.enter_context(new_directory(path, size, overwrite)) if first else partial_path(path)
        )
        agree(lambda: _write_all(folder, tensors, carried, max_shard_size, first))
        agree(lambda: first and _write_texts(folder, tensors, source, tokenizer, stop_ids, provenance))
        if check is not None:
            agree(lambda: check(folder))
        agree(stack.pop_all().close)  # the directory appears under its name
    return path


def _write_all(
    folder: Path, tensors: Tensors, carried: TensorDirectory, max_shard_size: int, first: bool
) -> None:
    """Writes the tensors from the first process; the others take part in gathering, whatever happens to the disk."""
    specs = [*tensors.specs, *(TensorSpec(info.name, info.dtype, info.shape) for info in carried.tensors.values())]
    order = [name for name in write_order(specs, max_shard_size) if name not in carried.tensors]
    gathered = 0

    def fetch(name: str) -> np.ndarray:
        nonlocal gathered
        if name in carried.tensors:
            return carried.read(name)
        gathered += 1
        return np.asarray(tensors.gather(name).block_until_ready())

    try:
        if first:
            write_tensors(folder, specs, fetch, max_shard_size)
    finally:
        if jax.process_count() > 1:
            for name in order[gathered:]:
                tensors.gather(name).block_until_ready()


def _write_texts(folder: Path, tensors: Tensors, source: Source, tokenizer, stop_ids, provenance: Provenance) -> None:
    if tokenizer is not None:
        tokenizer.save(folder)
    write_text(folder / CONFIG, to_json(_config(source, tensors.dtype)))
    write_text(folder / GENERATION_CONFIG, to_json(generation_config(source, tokenizer, stop_ids)))
    write_text(folder / PROVENANCE, to_json(provenance.to_dict()))
    write_text(folder / "README.md", _readme(source, tensors, provenance))


def _config(source: Source, dtype: str) -> dict:
    """Returns the source's config.json with the dtype of what is written, under the name that the source uses."""
    config = source.config_dict()
    text = config.get("text_config")  # of a model that is more than its language model
    if isinstance(text, dict):
        config["text_config"] = text | dict.fromkeys(_DTYPE_NAMES & text.keys(), dtype)
    return config | dict.fromkeys(_DTYPE_NAMES & config.keys() or {"torch_dtype"}, dtype)


def generation_config(source: Source, tokenizer: Tokenizer | None, stop_ids: Sequence[int]) -> dict:
    """Returns generation_config.json: the source's, with `stop_ids` added to those it stops at.

    A model whose files name no stop id gets its tokenizer's end-of-sequence id.
    """
    config = source.generation_dict()
    stops = [*source.stop_ids(), *(int(token) for token in stop_ids)]
    if not stops and tokenizer is not None and tokenizer.eos_id is not None:
        stops = [tokenizer.eos_id]
    stops = list(dict.fromkeys(stops))
    if len(stops) == 1 and not isinstance(config.get("eos_token_id"), list):
        config["eos_token_id"] = stops[0]
    elif stops:
        config["eos_token_id"] = stops
    return config


def _readme(source: Source, tensors: Tensors, provenance: Provenance) -> str:
    base = provenance.base
    is_hub_id = not Path(base).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base)
    count = sum(int(np.prod(spec.shape)) for spec in tensors.specs)
    rows = [
        ("base model", f"`{base}`"),
        ("architecture", f"`{source.config_dict()['architectures'][0]}`"),
        ("parameters", f"{count:,} in {tensors.dtype}"),
    ]
    if provenance.steps is not None:
        rows.append(("optimizer steps", f"{provenance.steps:,}"))
    rows.append(
        ("data fingerprint", f"`{provenance.data_fingerprint}`" if provenance.data_fingerprint else "not recorded")
    )
    front = [
        "---",
        "library_name: transformers",
        "tags: [sft_jax]",
        *([f"base_model: {base}"] if is_hub_id else []),
        "---",
    ]
    body = [
        "",
        f"# {Path(base).name}",
        "",
        f"Written by sft_jax {sft_jax.__version__}.",
        "",
        "| | |",
        "|---|---|",
    ]
    body += [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([*front, *body, ""])
