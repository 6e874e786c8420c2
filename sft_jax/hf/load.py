"""Reading a model: a Hugging Face directory, a hub id or the newest state of a run, straight into its shards."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sft_jax.checkpoint.processes import agree
from sft_jax.data.chats.template_defaults import with_defaults
from sft_jax.data.chats.templates import resolve_template
from sft_jax.data.tokenizers.tokens import Tokenizer, load_tokenizer
from sft_jax.errors import UserError
from sft_jax.hf.files import TensorDirectory
from sft_jax.hf.fingerprint import Checksums, fingerprint, random_fingerprint
from sft_jax.hf.match import dtypes_of, match, stored_tensors
from sft_jax.hf.merged import plain
from sft_jax.hf.names import name_table
from sft_jax.hf.peft.place import with_adapter
from sft_jax.hf.peft.read import read_adapter
from sft_jax.hf.peft.settings import is_adapter_directory
from sft_jax.hf.quantised import open_model
from sft_jax.hf.restore import check_base, restored, sound_checkpoint
from sft_jax.hf.rules import Stored
from sft_jax.hf.source import (
    ADAPTER,
    CONFIG,
    PARAM_DTYPES,
    Provenance,
    Source,
    added_tokens_of,
    base_of_adapter,
    checkpoint_of,
    find_model,
    has_export,
    has_tokenizer,
    is_adapter,
    is_run,
    place_of,
    read_provenance,
    read_source,
    run_config,
    tokenizer_folder,
)
from sft_jax.hf.stream import stream_parameters
from sft_jax.model.adapters import AdapterPlan
from sft_jax.model.attach import attach
from sft_jax.model.decoder import Decoder
from sft_jax.model.families import spec_from_config
from sft_jax.model.layers import dtype_of
from sft_jax.model.options import Options
from sft_jax.model.quantise import quantise
from sft_jax.model.sharding import constrain_fn, is_variable, make_mesh, named_leaves, path_name, shardings
from sft_jax.model.spec import DecoderSpec
from sft_jax.model.vocabulary import with_more_tokens

Progress = Callable[[int, int], None]  # (bytes read so far, bytes of all)


def load(
    path: str | Path,
    *,
    options: Options | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    base: str | Path | None = None,
) -> tuple[Decoder, Tokenizer | None]:
    """Loads a model and its tokenizer from a Hugging Face directory, a hub id, a run's workdir or an adapter of PEFT.

    Of a run this is its newest checkpoint (its best, where it has finished and keeps that), or its export where it has none; adapters that it trained lie on its base
    (`sft_jax.model.attach.merge` adds them to it), which has the dtype of the run. Other parameters keep the dtype that they
    are stored in; by default the arithmetic is float32 at highest precision, on one device. The tokenizer is None where the directory has none.
    `progress` is called with the bytes read so far and their total, while a directory is read. `base` is the base of an
    adapter that does not lie where the adapter says. Raises UserError for whatever is wrong with the directory.

        model, tokenizer = sft_jax.load("runs/quickstart")
        logits = model(tokens)  # int32 [B, L] -> float32 [B, L, V]
    """
    options = options or (Options() if mesh is None else Options(constrain=constrain_fn(mesh)))
    return load_decoder(path, options, mesh, progress=progress, base=base), load_model_tokenizer(path, base=base)


def load_decoder(
    path: str | Path,
    options: Options,
    mesh: Mesh | None = None,
    param_dtype: str | None = None,
    *,
    init: str = "checkpoint",
    seed: int = 0,
    vocab_size: int | None = None,
    progress: Progress | None = None,
    base: str | Path | None = None,
    stored_as: str = "",
    step: int | None = None,
) -> Decoder:
    """Reads a decoder from a Hugging Face directory, hub id, run or adapter, laid out over `mesh` (default: one device).

    `param_dtype` None keeps the dtype of the file. With `init` "random" only config.json is read and parameters are
    drawn from `seed`, the same on every mesh. With a `vocab_size` above its own the model is given more tokens. With
    `stored_as`, a key of KERNEL_FORMATS, the kernels of the blocks are quantised as they are read, and adapters are merged
    before. The decoder's attribute `source` says where it came from; an export carries it along, and `source.fingerprint`
    is of the numbers as they are stored. `progress` and `base` are those of `load`. `step` names a checkpoint of a run, None
    the best or newest. Raises UserError for whatever is wrong with the directory.
    """
    if init not in ("checkpoint", "random"):
        raise UserError(f"model.init: must be 'checkpoint' or 'random', not '{init}'.")
    if param_dtype not in (None, *PARAM_DTYPES):
        raise UserError(f"model.dtype: must be one of {', '.join(PARAM_DTYPES)}, not '{param_dtype}'.")
    mesh = make_mesh(1, 1, 1, jax.devices()[:1]) if mesh is None else mesh
    run, folder = agree(lambda: (place_of(path), find_model(path, base)))
    source = agree(lambda: read_source(folder, str(path)))
    if init == "random":
        source = source if vocab_size is None else source.with_vocab_size(vocab_size)
        return _random_decoder(source, options, mesh, param_dtype or "float32", seed, stored_as)
    if step is not None and not is_run(run):
        raise UserError(f"{path}: is not the workdir of a run, so it has no checkpoint of step {step}.")
    if is_run(run) and (step is not None or checkpoint_of(run) is not None):
        decoder = _stored(_restored_decoder(source, options, mesh, run, param_dtype, progress, base, step), stored_as)
    elif is_run(run) and not has_export(run):
        decoder = _stored(_adapted_decoder(run / ADAPTER, base, options, mesh, param_dtype, progress), stored_as)
    elif is_adapter(run):
        decoder = _stored(_adapted_decoder(run, base, options, mesh, param_dtype, progress), stored_as)
    else:
        decoder = _read_decoder(source, options, mesh, folder, param_dtype, progress, stored_as)
    if vocab_size is None or vocab_size <= decoder.spec.vocab_size:
        return decoder
    larger = with_more_tokens(plain(decoder), vocab_size)
    larger.source = decoder.source.with_vocab_size(vocab_size)
    return larger


def _read_decoder(
    source: Source,
    options: Options,
    mesh: Mesh,
    folder: Path,
    param_dtype: str | None,
    progress: Progress | None,
    stored_as: str,
) -> Decoder:
    """Returns a decoder with the parameters in the files of a Hugging Face directory."""
    decoder = abstract_decoder(source, options, mesh)
    tensors = agree(lambda: open_model(folder))
    table = name_table(source.config_dict())
    stored, ignored = agree(lambda: match(decoder, table, tensors))
    dtypes = dtypes_of(stored, tensors)
    if param_dtype:
        dtypes = {path: dtype_of(leaf, param_dtype) for path, leaf in named_leaves(decoder)}
    sums = Checksums()
    filled = quantise(_typed(decoder, dtypes), stored_as) if stored_as else decoder
    like = {path: leaf.get_value() for path, leaf in named_leaves(filled)}
    arrays = dict(stream_parameters(tensors, mesh, stored, like, dtypes, sums, progress, stored_as))
    filled.source = dataclasses.replace(
        source, ignored=ignored, fingerprint=_fingerprint(decoder, stored, tensors, sums.totals())
    )
    fill = lambda path, leaf: leaf.replace(arrays.pop(path_name(path)))  # noqa: E731
    return jax.tree_util.tree_map_with_path(fill, filled, is_leaf=is_variable)


def _stored(decoder: Decoder, stored_as: str) -> Decoder:
    return quantise(plain(decoder), stored_as) if stored_as else decoder


def load_model_tokenizer(
    path: str | Path, add_tokens: Sequence[str] = (), base: str | Path | None = None
) -> Tokenizer | None:
    """Returns the tokenizer of what `load_decoder` reads, with the run's chat template; None where there is none.

    It is given the tokens that runs on the way to `path` have added, and `add_tokens`.
    """
    run, folder = place_of(path), tokenizer_folder(path, base)
    beside_adapter = is_adapter_directory(folder)
    if is_adapter(run) and not beside_adapter:
        return load_model_tokenizer(base_of_adapter(run, base), add_tokens)
    if not has_tokenizer(folder):
        return None
    if not is_run(run) or (has_export(run) and base is None):
        return load_tokenizer(folder, add_tokens)
    config = run_config(run)
    tokens = tuple(dict.fromkeys((*added_tokens_of(run), *add_tokens)))
    model = base or config["model"]["path"]
    tokenizer = load_tokenizer(folder, tokens) if beside_adapter else load_model_tokenizer(model, tokens)
    template = resolve_template(config["data"]["chat_template"], tokenizer)
    kwargs = config["data"].get("chat_template_kwargs") or {}
    return tokenizer if template is None else tokenizer.with_chat_template(with_defaults(template, kwargs))


def abstract_decoder(source: Source, options: Options, mesh: Mesh, param_dtype: str = "float32") -> Decoder:
    """Returns the decoder of `source` with a ShapeDtypeStruct, sharding included, in place of every parameter.

    What restoring a checkpoint fills, and what compiling ahead of time needs. Raises UserError naming the model and
    the field of config.json, or the parameter that the mesh does not divide.
    """
    spec = spec_of(source)
    decoder = nnx.eval_shape(lambda: Decoder(spec, options, jax.random.key(0), param_dtype))
    decoder.source = source
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, decoder, shardings(decoder, mesh))


def spec_of(source: Source) -> DecoderSpec:
    """Returns what the model computes. Raises UserError naming the model and the field of config.json."""
    try:
        return spec_from_config(source.config_dict())
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error


def _fingerprint(
    decoder: Decoder, stored: Sequence[Stored], tensors: TensorDirectory, sums: dict[str, int]
) -> str:
    """Returns the fingerprint of a directory, in which tensors have the names that transformers writes."""
    table = name_table(decoder.source.config_dict())
    named = stored_tensors(decoder, table, table.roots[0])  # the same tensors in the same order
    infos = [tensors.tensors[tensor.name] for tensor in stored]
    return fingerprint(
        (as_written.name, info.shape, info.dtype.name, sums[info.name])
        for as_written, info in zip(named, infos, strict=True)
    )


def _typed(decoder: Decoder, dtypes: Mapping[str, jnp.dtype]) -> Decoder:
    """Returns an abstract decoder with these dtypes."""

    def typed(path, leaf):
        value = leaf.get_value()
        return leaf.replace(jax.ShapeDtypeStruct(value.shape, dtypes[path_name(path)], sharding=value.sharding))

    return jax.tree_util.tree_map_with_path(typed, decoder, is_leaf=is_variable)


def _random_decoder(
    source: Source, options: Options, mesh: Mesh, param_dtype: str, seed: int, stored_as: str
) -> Decoder:
    source = dataclasses.replace(source, fingerprint=random_fingerprint(source.config, seed, param_dtype))
    abstract = abstract_decoder(source, options, mesh, param_dtype)
    if stored_as:
        abstract = quantise(abstract, stored_as)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def draw(key):
        decoder = Decoder(abstract.spec, options, key, param_dtype)
        decoder.source = source
        return quantise(decoder, stored_as) if stored_as else decoder

    return jax.jit(draw, out_shardings=layout)(jax.random.key(seed))


def _restored_decoder(
    source: Source,
    options: Options,
    mesh: Mesh,
    run: Path,
    param_dtype: str | None,
    progress: Progress | None,
    base_path: str | Path | None,
    step: int | None,
) -> Decoder:
    """Returns a decoder with the parameters of a run's newest sound checkpoint, or that of `step`, which also says what model it is.

    Of a run that trained adapters, the base is read from its own files and carries them. It is read as it was in the run,
    whatever dtype is wanted: in another one, what merging or new tokens make of it would not be the base of these adapters.
    """
    checkpoint, manifest = sound_checkpoint(run, step)
    settings = manifest["config"]
    base_path, base_dtype = str(base_path or run_config(run)["model"]["path"]), settings.get("adapter", {}).get("base_dtype", "")
    provenance = Provenance(base_path, manifest["plan_hash"], manifest["step"], manifest.get("base_fingerprint"), base_dtype)
    source = dataclasses.replace(source, config=manifest["model_config"], provenance=provenance)
    if not manifest.get("adapters"):
        return restored(abstract_decoder(source, options, mesh), checkpoint, manifest, param_dtype, None)
    base = plain(load_decoder(
        base_path, options, mesh, settings["model"]["dtype"], init=settings["model"]["init"], seed=settings["seed"],
        vocab_size=spec_of(source).vocab_size, progress=progress, stored_as=base_dtype,
    ))  # fmt: skip
    check_base(manifest["base_fingerprint"], base.source, f"{run / CONFIG}: model.path")
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), base)
    abstract.source = source
    decoder = attach(abstract, AdapterPlan.from_dict(manifest["adapters"]), jax.random.key(0))
    return restored(decoder, checkpoint, manifest, param_dtype, base)


def _adapted_decoder(
    folder: Path, base: str | Path | None, options: Options, mesh: Mesh, param_dtype: str | None, progress: Progress | None
) -> Decoder:
    """Returns a decoder with the adapter of PEFT in `folder` on its base."""
    named = agree(lambda: base_of_adapter(folder, base))
    provenance = agree(lambda: read_provenance(folder))
    stored_as = provenance.base_dtype if provenance is not None else ""
    decoder = plain(load_decoder(named, options, mesh, param_dtype, progress=progress, stored_as=stored_as))
    if provenance is not None and provenance.base_fingerprint is not None:
        check_base(provenance.base_fingerprint, decoder.source, str(folder))
    adapter = agree(lambda: read_adapter(folder, decoder))
    adapted = with_adapter(decoder, adapter, folder)
    lines = [(f"base {decoder.source.fingerprint}", (), "", 0), (f"adapter {adapter.digest}", (), "", 0)]
    provenance = provenance or Provenance(named, base_fingerprint=decoder.source.fingerprint)
    adapted.source = dataclasses.replace(
        decoder.source, fingerprint=fingerprint(lines), provenance=dataclasses.replace(provenance, base=named)
    )
    return adapted
