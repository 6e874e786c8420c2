"""Which modules of transformers can carry an adapter, and which kernels of ours lie in their weights.

PEFT names a module as transformers does in memory, which is how the tensors of a checkpoint are named but for a few
families. Where transformers holds several projections in one weight (Phi-3's queries, keys and values, the experts of a
layer), one adapter of PEFT stands for those of all of them: going there their ranks are put side by side, coming from
there each gets its own share, both exactly.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sft_jax.hf.names import name_table
from sft_jax.hf.names.table import NameTable
from sft_jax.hf.rules import Packing, Rule, Stored, expand
from sft_jax.model.adapters import base_shapes
from sft_jax.model.decoder import Decoder
from sft_jax.model.runs import layer_places

TIED_HEAD = "lm_head"  # what transformers calls the module of a head that is tied to the embedding
_EXPERTS_IN_FILES = re.compile(r"(.*?)(?<!shared_mlp)\.(experts\.\{expert\}\.\w+|input_linear|output_linear)\.weight")


@dataclass(frozen=True)
class Factors:
    """An adapter as PEFT computes it: scale * b @ a is added to a weight [out, in]. With experts all have one in front."""

    a: np.ndarray  # [r, in] or [E, r, in]
    b: np.ndarray  # [out, r] or [E, out, r]
    scale: float
    magnitude: np.ndarray | None = None  # [out], of DoRA

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


@dataclass(frozen=True)
class Carrier:
    """A module whose weight an adapter can change, or a parameter that holds experts."""

    name: str  # such as "model.layers.0.self_attn.q_proj", or "model.layers.0.mlp.experts.down_proj" of a parameter
    paths: tuple[str, ...]  # of our modules, in the order in which their kernels lie in the weight
    index: tuple[int, ...]  # of the slice of their stacks
    packing: Packing
    embedding: bool = False

    @property
    def experts(self) -> bool:
        return len(self.packing.shapes[0]) == 3

    @property
    def size(self) -> tuple[int, int]:
        """Inputs and outputs of the weight."""
        *_, first, last = self.packing.shape
        return (last, first) if self.packing.transpose else (first, last)

    def columns(self, number: int) -> np.ndarray:
        """Returns which of the outputs of the weight are those of part `number`."""
        out_axis = -2 if self.packing.transpose else -1
        sizes = [shape[out_axis] for shape in self.packing.shapes]
        if self.packing.interleaved:
            return np.arange(number, sum(sizes), len(sizes))
        return np.arange(sum(sizes[:number]), sum(sizes[: number + 1]))

    def join(self, parts: Sequence[Factors | None], lengths: Sequence[np.ndarray] | None = None) -> Factors:
        """Returns the one adapter that stands for those of the parts; None is a part that has none.

        Ranks lie side by side, so a part reads its own. `lengths` are the magnitudes of parts, also of those without an
        adapter, where there are any.
        """
        present = [(number, part) for number, part in enumerate(parts) if part is not None]
        scale = present[0][1].scale
        out = sum(len(self.columns(number)) for number in range(len(parts)))
        b = np.zeros((*present[0][1].b.shape[:-2], out, sum(part.rank for _, part in present)), np.float32)
        first = 0
        for number, part in present:
            b[..., self.columns(number), first : first + part.rank] = part.b * np.float32(part.scale / scale)
            first += part.rank
        magnitude = None
        if lengths is not None:
            magnitude = np.zeros(out, np.float32)
            for number, values in enumerate(lengths):
                magnitude[self.columns(number)] = values
        return Factors(np.concatenate([part.a for _, part in present], axis=-2), b, scale, magnitude)

    def part(self, factors: Factors, number: int) -> Factors:
        """Returns the adapter of part `number`, of the whole rank: the inverse of `join` as a change of the kernel."""
        columns = self.columns(number)
        magnitude = None if factors.magnitude is None else factors.magnitude[columns]
        return dataclasses.replace(factors, b=factors.b[..., columns, :], magnitude=magnitude)


def module_tensors(decoder: Decoder) -> list[Stored]:
    """Returns the tensors of the base of `decoder` as the modules of transformers hold them."""
    return _expanded(decoder, _module_rules(_table(decoder), decoder))


def carriers(decoder: Decoder) -> list[Carrier]:
    """Returns every module of transformers that can carry an adapter."""
    found = [carrier for tensor in module_tensors(decoder) if (carrier := _carrier(tensor))]
    if decoder.spec.tied_head:  # the other name of the embedding, as a weight [V, D] of outputs and inputs
        embedding = next(carrier for carrier in found if carrier.embedding)
        found.append(Carrier(TIED_HEAD, embedding.paths, (), dataclasses.replace(embedding.packing, transpose=True)))
    return found


def carriers_in_files(decoder: Decoder) -> list[Carrier]:
    """Returns the same under names that adapters of older versions of transformers have: those of checkpoints."""
    table = _table(decoder)
    rules = [table.rules(decoder.spec, root) for root in table.roots]
    return [carrier for some in rules for tensor in _expanded(decoder, some) if (carrier := _carrier(tensor))]


def _table(decoder: Decoder) -> NameTable:
    return name_table(decoder.source.config_dict())


def _expanded(decoder: Decoder, rules: list[Rule]) -> list[Stored]:
    return expand(rules, layer_places(decoder.spec), base_shapes(decoder))


def _module_rules(table: NameTable, decoder: Decoder) -> list[Rule]:
    """Returns the rules of a checkpoint with the names of modules, the experts of a layer in two parameters."""
    rules, layers_of = [], {}
    for rule in table.rules(decoder.spec, table.roots[0]):
        hf = table.module_name(rule.hf)
        experts = _EXPERTS_IN_FILES.fullmatch(hf)
        if experts:
            layers_of[experts[1]] = rule.layers
        else:
            rules.append(dataclasses.replace(rule, hf=hf))
    both = ("mlp.gate.kernel", "mlp.up.kernel")
    for folder, layers in layers_of.items():
        rules.append(Rule(f"{folder}.experts.gate_up_proj", both, transpose=True, axis=1, layers=layers))
        rules.append(Rule(f"{folder}.experts.down_proj", "mlp.down.kernel", transpose=True, layers=layers))
    return rules


def _carrier(tensor: Stored) -> Carrier | None:
    modules = tuple(path.rpartition(".")[0] for path in tensor.paths)
    names = {path.rpartition(".")[2] for path in tensor.paths}
    if names == {"embedding"}:
        return Carrier(tensor.name.removesuffix(".weight"), modules, tensor.index, tensor.packing, embedding=True)
    routes = any(module.endswith(".router") for module in modules)
    if names != {"kernel"} or routes:
        return None
    return Carrier(tensor.name.removesuffix(".weight"), modules, tensor.index, tensor.packing)
