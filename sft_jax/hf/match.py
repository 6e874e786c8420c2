"""Which tensors of a directory make up a decoder, decided from the headers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from sft_jax.errors import UserError
from sft_jax.hf.files import TensorDirectory, equal_bytes
from sft_jax.hf.names.table import NameTable, Root
from sft_jax.hf.rules import Stored, check_bijection, expand
from sft_jax.hf.source import PARAM_DTYPES
from sft_jax.model.decoder import Decoder
from sft_jax.model.runs import layer_places
from sft_jax.model.sharding import named_leaves
from sft_jax.model.vocabulary import stored_shape


class Match(NamedTuple):
    """What a directory's tensors are."""

    stored: list[Stored]  # parameters
    ignored: tuple[str, ...]  # no parameters, and not carried either


def stored_tensors(decoder: Decoder, table: NameTable, root: Root) -> list[Stored]:
    """Returns the tensors that hold the parameters of `decoder`, abstract or not, in the order they are written in."""
    shapes = {path: stored_shape(leaf, decoder.spec) for path, leaf in named_leaves(decoder)}
    return expand(table.rules(decoder.spec, root), layer_places(decoder.spec), shapes)


def match(decoder: Decoder, table: NameTable, tensors: TensorDirectory) -> Match:
    """Matches the tensors of a directory with the parameters of `decoder`.

    Only a head that is stored although config.json ties it is read and compared. Raises UserError unless tensors and
    parameters match one to one, in shape too, and are 16 or 32 bit floating point.
    """
    where, infos = str(tensors.folder), tensors.tensors
    root = table.find_root(infos)
    if root is None:
        table.refuse_other_roots(infos, where)
        root = table.roots[0]
    stored = stored_tensors(decoder, table, root)
    carried = set(table.carried_names(decoder.spec, infos))
    shapes = {name: info.shape for name, info in infos.items() if name not in carried}
    if {tensor.name for tensor in stored} - shapes.keys() == {root.head}:
        raise UserError(
            f"{where}: lacks the head, '{root.head}', and config.json does not tie it to the embedding "
            "(tie_word_embeddings); the checkpoint was saved without it, or config.json is of another model."
        )
    ignored = check_bijection(stored, shapes, table.ignored_patterns(decoder.spec, root), where)
    for tensor in stored:
        info = infos[tensor.name]
        if info.dtype.name not in PARAM_DTYPES:
            raise UserError(
                f"{info.file}: tensor '{info.name}' is {info.dtype.name}; parameters must be "
                f"{', '.join(PARAM_DTYPES)}. Take the checkpoint that is not quantised, or convert it."
            )
    if root.head in ignored:
        _check_tied_head(tensors, root.head, table.embedding_name(root))
    return Match(stored, tuple(ignored))


def dtypes_of(stored: Sequence[Stored], tensors: TensorDirectory) -> dict[str, jnp.dtype]:
    """Returns for each parameter the dtype that holds all its tensors exactly."""
    found: dict[str, set] = {}
    for tensor in stored:
        for path in tensor.paths:
            found.setdefault(path, set()).add(tensors.tensors[tensor.name].dtype)
    return {path: jnp.result_type(*dtypes) for path, dtypes in found.items()}


def _check_tied_head(tensors: TensorDirectory, head_name: str, embedding_name: str) -> None:
    """Raises UserError where a head that config.json ties to the embedding is stored with other values."""
    head, embedding = tensors.tensors[head_name], tensors.tensors[embedding_name]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same or not equal_bytes(tensors, head_name, tensors, embedding_name):
        raise UserError(
            f"{head.file}: tensor '{head_name}' differs from '{embedding_name}', but config.json ties them "
            "(tie_word_embeddings); set it to false to use this head, or remove the tensor."
        )
