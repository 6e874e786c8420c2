"""Rules that move bytes between a checkpoint's tensors and a decoder's parameters, and the check that all are moved.

A rule pairs one name of the Hugging Face format with the parameters that its tensor holds. It is run in both
directions, so import and export cannot drift apart, and it only moves bytes: parts of a tensor are cut out of it or
joined to it, and their last two dimensions swapped. Which tensor fills which slice is decided from the headers, before
a byte of a tensor is read.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft_jax.errors import UserError
from sft_jax.model.runs import Place

_SHOWN = 8  # names that an error lists


@dataclass(frozen=True)
class Rule:
    """One tensor of the checkpoint and the parameters that it holds.

    With `{layer}` in `hf` there is one such tensor a layer, and `params` are paths inside the block: tensor i is a slice
    of the stacked parameter `runs.RUN.PLACE.param`. Without it they are paths from the root. With `{expert}` as well
    there is one tensor an expert, and it is a slice of the parameter's second dimension.

    Several parameters lie side by side along dimension `axis` of the tensor as it is stored, or alternate along it.
    """

    hf: str
    params: str | tuple[str, ...]
    transpose: bool = False  # the checkpoint holds [..., out, in], the parameter [..., in, out]
    axis: int = 0
    interleaved: bool = False  # entry i of the axis is of parameter i % len(params); otherwise one after the other
    layers: Sequence[int] | None = None  # the layers that have this tensor; None = all of them

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.params,) if isinstance(self.params, str) else self.params


@dataclass(frozen=True)
class Packing:
    """How one tensor holds its parts. Equal for the same tensor of every layer, so that they share compiled code.

    Both directions take numpy and jax arrays, with any number of dimensions before those of the tensor.
    """

    shapes: tuple[tuple[int, ...], ...]  # of the parts, as they lie in the tensor
    transpose: bool
    axis: int  # counted from the end, so negative
    interleaved: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        shape = list(self.shapes[0])
        shape[self.axis] = sum(part[self.axis] for part in self.shapes)
        return tuple(shape)

    def parameter_shape(self, number: int) -> tuple[int, ...]:
        """Returns the shape of part `number` as its parameter holds it."""
        shape = self.shapes[number]
        return (*shape[:-2], shape[-1], shape[-2]) if self.transpose else shape

    def rows(self, number: int) -> tuple[int, int] | None:
        """Returns (first, count) of the rows that part `number` is, or None where it is no range of whole rows."""
        if self.interleaved or self.axis != -len(self.shape):
            return None
        sizes = [shape[0] for shape in self.shapes]
        return sum(sizes[:number]), sizes[number]

    def part(self, number: int) -> "Packing":
        """Returns the packing of part `number` alone."""
        return Packing((self.shapes[number],), self.transpose, self.axis, False)

    def cut(self, tensor, number: int):
        """Returns part `number` of a tensor, as its parameter holds it."""
        if len(self.shapes) > 1:
            sizes = [shape[self.axis] for shape in self.shapes]
            first = sum(sizes[:number])
            extent = slice(number, None, len(sizes)) if self.interleaved else slice(first, first + sizes[number])
            tensor = tensor[(..., extent, *[slice(None)] * (-self.axis - 1))]
        return tensor.swapaxes(-1, -2) if self.transpose else tensor

    def join(self, parts: Sequence):
        """Returns the tensor of which these, as parameters hold them, are the parts: the inverse of `cut`."""
        if self.transpose:
            parts = [part.swapaxes(-1, -2) for part in parts]
        if len(parts) == 1:
            return parts[0]
        arrays = parts[0].__array_namespace__()
        if not self.interleaved:
            return arrays.concatenate(parts, axis=self.axis)
        leading = parts[0].shape[: parts[0].ndim - len(self.shape)]
        return arrays.stack(parts, axis=self.axis).reshape(*leading, *self.shape)


class Stored(NamedTuple):
    """One tensor of a checkpoint, and the slices of parameters that are its parts."""

    name: str
    paths: tuple[str, ...]  # of the parameters, one a part
    index: tuple[int, ...]  # of the slice: nothing for whole parameters, (repeat,) or (repeat, expert) in a stack
    packing: Packing


def expand(rules: Iterable[Rule], places: Sequence[Place], params: Mapping[str, tuple[int, ...]]) -> list[Stored]:
    """Returns every tensor of a checkpoint: those before the layers, the layers one after the other, those after them.

    `params` are the shapes of the decoder's parameters by path. Raises AssertionError where the rules do not fill each
    of them exactly once; that is a bug in the table, not bad input.
    """
    tensors: list[tuple[tuple[int, int], Stored]] = []
    in_layers = False
    for rule in rules:
        if "{layer}" not in rule.hf:
            tensors.append(((2 if in_layers else 0, 0), _stored(rule, rule.hf, rule.paths, (), params)))
            continue
        in_layers = True
        for layer, (run, place, index) in enumerate(places):
            if rule.layers is not None and layer not in rule.layers:
                continue
            paths = tuple(f"runs.{run}.{place}.{param}" for param in rule.paths)
            for expert in range(params[paths[0]][1]) if "{expert}" in rule.hf else (None,):
                slices = (index,) if expert is None else (index, expert)
                name = rule.hf.format(layer=layer, expert=expert)
                tensors.append(((1, layer), _stored(rule, name, paths, slices, params)))
    result = [tensor for _, tensor in sorted(tensors, key=lambda item: item[0])]
    _check_cover(result, params)
    return result


def _stored(rule: Rule, name: str, paths, index: tuple[int, ...], params: Mapping[str, tuple[int, ...]]) -> Stored:
    assert params.keys() >= set(paths), (rule, paths)
    shapes = [params[path][len(index) :] for path in paths]
    if rule.transpose:
        shapes = [(*shape[:-2], shape[-1], shape[-2]) for shape in shapes]
    axis = rule.axis - len(shapes[0]) if rule.axis >= 0 else rule.axis
    around = {(*shape[:axis], *shape[axis:][1:]) for shape in shapes}
    assert len(around) == 1 and (not rule.interleaved or len(set(shapes)) == 1), (rule, shapes)
    return Stored(name, paths, index, Packing(tuple(shapes), rule.transpose, axis, rule.interleaved))


def _check_cover(tensors: Sequence[Stored], params: Mapping[str, tuple[int, ...]]) -> None:
    names = [tensor.name for tensor in tensors]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
    filled: dict[str, list[tuple[int, ...]]] = {path: [] for path in params}
    for tensor in tensors:
        for path in tensor.paths:
            filled[path].append(tensor.index)
    for path, indices in filled.items():
        assert indices, f"no rule fills {path}"
        whole = itertools.product(*(range(size) for size in params[path][: len(indices[0])]))
        assert sorted(indices) == list(whole), (path, indices)


def check_bijection(
    stored: Sequence[Stored], tensors: Mapping[str, tuple[int, ...]], ignored: Sequence[str], where: str
) -> list[str]:
    """Checks that a checkpoint holds exactly the tensors that the model is made of, with their shapes.

    `tensors` maps the names in the checkpoint to shapes; `ignored` are regular expressions of those that hold no
    parameter. Returns the tensors left out because of them. Raises UserError beginning with `where` that lists the
    missing and the unexpected names, or the first wrong shape.
    """
    expected = {tensor.name: tensor for tensor in stored}
    left_out = [name for name in tensors if name not in expected and any(re.fullmatch(p, name) for p in ignored)]
    missing = [name for name in expected if name not in tensors]
    known = {*expected, *left_out}
    unexpected = [name for name in tensors if name not in known]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} tensors that config.json asks for: {_names(missing, unexpected)}")
        if unexpected:
            parts.append(
                f"holds {len(unexpected)} tensors that the model has no place for: {_names(unexpected, missing)}"
            )
        raise UserError(f"{where}: {'; and it '.join(parts)}. config.json and weights must be of the same model.")
    for tensor in stored:
        if tensors[tensor.name] != tensor.packing.shape:
            raise UserError(
                f"{where}: tensor '{tensor.name}' has the shape {list(tensors[tensor.name])}, but config.json asks for "
                f"{list(tensor.packing.shape)} (parameter {', '.join(tensor.paths)}); config.json and weights must be "
                "of the same model."
            )
    return left_out


def _names(names: Sequence[str], others: Sequence[str]) -> str:
    """Returns the first names, each with the nearest name on the other side: most mismatches are a renaming."""
    shown = []
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, others[:200], n=1, cutoff=0.7)
        shown.append(f"'{name}'" + (f" (nearest: '{near[0]}')" if near else ""))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + more
