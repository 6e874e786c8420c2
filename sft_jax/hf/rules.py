"""Rules that move bytes between a checkpoint's tensors and a decoder's parameters, and the check that all are moved.

A rule pairs one name of the Hugging Face format with one parameter path. It is run in both directions, so import and
export cannot drift apart, and it only moves bytes: a copy, or a transpose of the last two dimensions. Which tensor
fills which slice is decided from the headers, before a byte of a tensor is read.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft_jax.errors import UserError
from sft_jax.model.runs import Place

_SHOWN = 8  # names that an error lists


@dataclass(frozen=True)
class Rule:
    """One tensor of the checkpoint and the parameter that holds it.

    With `{layer}` in `hf` there is one such tensor a layer, and `param` is a path inside the block: tensor i is a slice
    of the stacked parameter `runs.RUN.PLACE.param`. Without it, `param` is a path from the root.
    """

    hf: str
    param: str
    transpose: bool = False  # the checkpoint holds [out, in], the parameter [in, out]


class Piece(NamedTuple):
    """A tensor of the checkpoint as a part of a parameter."""

    name: str
    index: int | None  # place in the parameter's leading, stacked dimension; None = the whole parameter
    transpose: bool


def pieces_by_param(rules: Iterable[Rule], places: Sequence[Place]) -> dict[str, tuple[Piece, ...]]:
    """Returns for every parameter path the tensors that make it up, in the order of their index."""
    pieces: dict[str, list[Piece]] = {}
    for rule in rules:
        if "{layer}" not in rule.hf:
            pieces.setdefault(rule.param, []).append(Piece(rule.hf, None, rule.transpose))
            continue
        for layer, (run, place, index) in enumerate(places):
            path = f"runs.{run}.{place}.{rule.param}"
            pieces.setdefault(path, []).append(Piece(rule.hf.format(layer=layer), index, rule.transpose))
    return {path: tuple(sorted(parts, key=lambda part: part.index or 0)) for path, parts in pieces.items()}


def tensor_shape(piece: Piece, param_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape in the checkpoint of a piece of a parameter."""
    shape = tuple(param_shape if piece.index is None else param_shape[1:])
    return (*shape[:-2], shape[-1], shape[-2]) if piece.transpose else shape


def check_bijection(
    pieces: Mapping[str, tuple[Piece, ...]],
    params: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, tuple[int, ...]],
    ignored: Sequence[str],
    where: str,
) -> list[str]:
    """Checks that every tensor is consumed once and every parameter filled once, with equal shapes.

    `params` and `tensors` map names to shapes; `ignored` are regular expressions of tensors that hold no parameter.
    Returns the tensors left out because of them. Raises UserError beginning with `where` that lists the missing and
    the unexpected names, or the first wrong shape.
    """
    _check_rules(pieces, params)
    expected = {piece.name: (path, piece) for path, parts in pieces.items() for piece in parts}
    left_out = [name for name in tensors if name not in expected and any(re.fullmatch(p, name) for p in ignored)]
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected and name not in left_out]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} tensors that config.json asks for: {_names(missing, unexpected)}")
        if unexpected:
            parts.append(
                f"holds {len(unexpected)} tensors that the model has no place for: {_names(unexpected, missing)}"
            )
        raise UserError(f"{where}: {'; and it '.join(parts)}. config.json and weights must be of the same model.")
    for name, (path, piece) in expected.items():
        shape = tensor_shape(piece, params[path])
        if tensors[name] != shape:
            raise UserError(
                f"{where}: tensor '{name}' has the shape {list(tensors[name])}, but config.json asks for {list(shape)} "
                f"(parameter {path}); config.json and weights must be of the same model."
            )
    return left_out


def _check_rules(pieces: Mapping[str, tuple[Piece, ...]], params: Mapping[str, tuple[int, ...]]) -> None:
    """Raises AssertionError where the table of rules itself is no bijection; that is a bug, not bad input."""
    assert pieces.keys() == params.keys(), sorted(pieces.keys() ^ params.keys())
    names = [piece.name for parts in pieces.values() for piece in parts]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
    for path, parts in pieces.items():
        indices = [piece.index for piece in parts]
        assert indices == [None] or indices == list(range(params[path][0])), (path, indices)


def _names(names: Sequence[str], others: Sequence[str]) -> str:
    """Returns the first names, each with the nearest name on the other side: most mismatches are a renaming."""
    shown = []
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, others[:200], n=1, cutoff=0.7)
        shown.append(f"'{name}'" + (f" (nearest: '{near[0]}')" if near else ""))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + more
