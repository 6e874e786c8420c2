"""Writing a decoder as a Hugging Face directory: the names and bytes that loading read, one tensor at a time."""

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sft_jax
from sft_jax.checkpoint.processes import agree
from sft_jax.data.tokens import Tokenizer
from sft_jax.errors import UserError
from sft_jax.hf import names
from sft_jax.hf.rules import Packing, Stored, expand
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
from sft_jax.model.runs import layer_places
from sft_jax.model.sharding import named_leaves


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

    `dtype` None writes every parameter in the dtype it has. `stop_ids`, such as the chat template's end of turn, join
    the model's own in generation_config.json. `provenance`, by default that of what the model was loaded from, is
    written into README.md and sft_jax.json. Tensors go into files of at most `max_shard_size` bytes. `overwrite`
    replaces an earlier export. `check`, called with the written directory before it appears at `path`, may refuse it
    by raising. Of several processes all must call this; the first one writes.

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
    tensors = Tensors(model, dtype)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        folder = agree(
            lambda: stack.enter_context(new_directory(path, tensors.nbytes, overwrite)) if first else partial_path(path)
        )
        agree(lambda: _write_all(folder, tensors, max_shard_size, first))
        agree(lambda: first and _write_texts(folder, tensors, source, tokenizer, stop_ids, provenance))
        if check is not None:
            agree(lambda: check(folder))
        agree(stack.pop_all().close)  # the directory appears under its name
    return path


class Tensors:
    """The tensors that a decoder has in the Hugging Face format, computed one by one."""

    def __init__(self, decoder: Decoder, dtype: str | None = None):
        self._params = {path: leaf.get_value() for path, leaf in named_leaves(decoder)}
        shapes = {path: param.shape for path, param in self._params.items()}
        stored = expand(names.name_table(decoder.source.config_dict()).rules(decoder.spec), layer_places(decoder.spec), shapes)
        self._stored = {tensor.name: tensor for tensor in stored}
        self._asked = dtype
        self.specs = [TensorSpec(tensor.name, self._dtype(tensor), tensor.packing.shape) for tensor in stored]
        self.nbytes = sum(spec.nbytes for spec in self.specs)

    def gather(self, name: str) -> jax.Array:
        """Returns one tensor. Of several processes all must call this, in the same order."""
        tensor = self._stored[name]
        parts = tuple(self._params[path] for path in tensor.paths)
        take = _taker(_readable(parts[0].sharding), tensor.packing, self._dtype(tensor))
        return take(parts, np.asarray(tensor.index, np.int32))

    def _dtype(self, tensor: Stored) -> np.dtype:
        return np.dtype(self._asked or jnp.result_type(*(self._params[path].dtype for path in tensor.paths)))

    @property
    def dtype(self) -> str:
        """The dtype that most bytes have."""
        sizes: dict[str, int] = {}
        for spec in self.specs:
            sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.nbytes
        return max(sizes, key=sizes.get)


@functools.lru_cache(maxsize=256)
def _taker(sharding, packing: Packing, dtype: np.dtype) -> Callable[..., jax.Array]:
    def take(params, index):
        parts = []
        for param in params:
            start = [*index, *[0] * (param.ndim - len(index))]
            part = jax.lax.dynamic_slice(param, start, (*[1] * len(index), *param.shape[len(index) :]))
            parts.append(part.reshape(param.shape[len(index) :]).astype(dtype))
        return packing.join(parts)

    return jax.jit(take, out_shardings=sharding)


def _readable(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding | None:
    """Returns the sharding in which one process can read an array; None leaves the layout to the compiler."""
    if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
        return NamedSharding(sharding.mesh, P())
    return None


def _write_all(folder: Path, tensors: Tensors, max_shard_size: int, first: bool) -> None:
    """Writes the tensors from the first process; the others take part in gathering, whatever happens to the disk."""
    order = write_order(tensors.specs, max_shard_size)
    gathered = 0

    def fetch(name: str) -> np.ndarray:
        nonlocal gathered
        gathered += 1
        return np.asarray(tensors.gather(name).block_until_ready())

    try:
        if first:
            write_tensors(folder, tensors.specs, fetch, max_shard_size)
    finally:
        if jax.process_count() > 1:
            for name in order[gathered:]:
                tensors.gather(name).block_until_ready()


def _write_texts(folder: Path, tensors: Tensors, source: Source, tokenizer, stop_ids, provenance: Provenance) -> None:
    if tokenizer is not None:
        tokenizer.save(folder)
    write_text(folder / CONFIG, to_json(_config(source, tensors.dtype)))
    write_text(folder / GENERATION_CONFIG, to_json(generation_config(source, tokenizer, stop_ids)))
    named = dict(base_model=provenance.base, data_fingerprint=provenance.data_fingerprint, steps=provenance.steps)
    write_text(folder / PROVENANCE, to_json(named))
    write_text(folder / "README.md", _readme(source, tensors, provenance))


def _config(source: Source, dtype: str) -> dict:
    """Returns the source's config.json with the dtype of what is written, under the name that the source uses."""
    config = source.config_dict()
    names_used = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    return config | dict.fromkeys(names_used, dtype)


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
