"""Which projections of a decoder carry an adapter, and what is trained beside them.

Stacked layers of a run are one kernel with a leading dimension, so a pattern chooses all of them or none.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from sft_jax.errors import UserError
from sft_jax.model.decoder import Decoder
from sft_jax.model.layers import Embed, ExpertLinear, Linear
from sft_jax.model.sharding import named_leaves

_SHOWN = 6  # paths that an error lists


@dataclass(frozen=True)
class ModulePlan:
    """The adapter of one projection, or of the embedding."""

    path: str  # of the module, such as "runs.0.0.attention.query"
    rank: int
    scale: float  # of the product of the two matrices
    magnitude: bool  # DoRA
    start: bool  # begins with the principal part of the kernel, which is subtracted again (PiSSA)


@dataclass(frozen=True)
class AdapterPlan:
    """What is trained beside a base that stays as it is. Plain values, so that it is written into manifests."""

    modules: tuple[ModulePlan, ...]
    dropout: float  # share of the adapters' inputs that is dropped in training
    tokens: tuple[int, ...]  # ids whose rows of embedding and head are trained, ascending
    trained: tuple[str, ...]  # paths of the base's parameters that are trained whole
    rslora: bool  # scales were made by rank-stabilised scaling; said again where the adapter is written

    @property
    def shape(self) -> "AdapterPlan":
        """The plan without what may change while it is trained: equal where parameters have the same paths and shapes."""
        return dataclasses.replace(self, dropout=0.0)

    def __str__(self) -> str:
        """Returns what carries what, and what is trained beside it."""
        ranks = ", ".join(map(str, sorted({module.rank for module in self.modules})))
        kinds = {"DoRA": any(m.magnitude for m in self.modules), "PiSSA": any(m.start for m in self.modules)}
        kind = " with ".join(name for name, has in kinds.items() if has) or "LoRA"
        names = ", ".join(dict.fromkeys(module.path.removeprefix("runs.").split(".", 2)[-1] for module in self.modules))
        parts = [f"{kind} of rank {ranks} on {names}"] if names else []
        parts += [f"rows of {len(self.tokens)} tokens"] if self.tokens else []
        parts += [f"{', '.join(self.trained)} whole"] if self.trained else []
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterPlan":
        """Returns the plan of which `values` are the `to_dict`, also after a way through JSON."""
        modules = tuple(ModulePlan(**module) for module in values["modules"])
        return cls(modules, values["dropout"], tuple(values["tokens"]), tuple(values["trained"]), values["rslora"])


def plan_adapters(
    decoder: Decoder,
    *,
    name: str,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
    rslora: bool = False,
    init: str = "default",
    train: Sequence[str] = (),
    tokens: Iterable[int] = (),
) -> AdapterPlan:
    """Returns what the keys of the `adapter` section ask for on this decoder, which may be abstract.

    Patterns are regular expressions that are searched in paths: `targets` in those of projections, of the embedding
    ("embed") and of the head ("lm_head"), by default all projections of the blocks; `train` in those of parameters. The
    product of the matrices is scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora` (arXiv:2312.03732).

    Raises UserError naming the key where a pattern matches nothing, a rank is too large, or two keys contradict each other.
    """
    modules = dict(adaptable(decoder))
    chosen = _matching("adapter.targets", targets, modules, decoder) if targets else _default_targets(modules)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    plans = []
    for path in chosen:
        shape = kernel_of(modules[path]).get_value().shape
        if rank > min(shape[-2:]):
            raise UserError(
                f"adapter.rank: {rank} is larger than {path} {list(shape[-2:])} allows; at most {min(shape[-2:])}, or name "
                "adapter.targets without it."
            )
        _check_kind(modules[path], path, name, dropout, init)
        plans.append(ModulePlan(path, rank, scale, magnitude=name == "dora", start=init == "pissa"))
    parameters = {path: None for path, _ in named_leaves(decoder)}
    trained = _matching("adapter.train", train, parameters, decoder) if train else []
    for path in trained:
        if path.rpartition(".")[0] in chosen and path.rpartition(".")[2] in ("kernel", "embedding"):
            raise UserError(
                f"adapter.train: matches {path}, which carries an adapter; leave it out here or in adapter.targets."
            )
    tokens = tuple(sorted(set(tokens)))
    _check_tokens(decoder, tokens, chosen, trained)
    return AdapterPlan(tuple(plans), dropout, tokens, tuple(trained), rslora)


def adaptable(decoder: Decoder) -> list[tuple[str, Linear | ExpertLinear | Embed]]:
    """Returns the modules that can carry an adapter, by path, in the order of the parameters.

    Routers cannot: they choose in float32, and are small enough to be trained whole.
    """
    found: dict[str, Any] = {}
    for path, _ in named_leaves(decoder):
        module = path.rpartition(".")[0]
        if module not in found and not module.endswith(".mlp.router") and "adapter" not in path.split("."):
            node = module_at(decoder, module) if module else None
            if isinstance(node, Linear | ExpertLinear | Embed):
                found[module] = node
    return list(found.items())


def is_adapter(path: str) -> bool:
    """Returns whether the parameter at `path` belongs to an adapter and not to the base."""
    return not {"adapter", "token_rows", "head_rows"}.isdisjoint(path.split("."))


def is_trained(plan: AdapterPlan, path: str) -> bool:
    """Returns whether training changes the parameter at `path`: all of adapters but what they subtract, and `plan.trained`."""
    return path in plan.trained or is_adapter(path) and not path.rpartition(".")[2].startswith("start_")


def module_at(decoder: Decoder, path: str) -> nnx.Module:
    """Returns the module of `decoder` at a dotted path."""
    node = decoder
    for part in path.split("."):
        node = node[int(part)] if part.isdecimal() else getattr(node, part)
    return node


def kernel_of(module: Linear | ExpertLinear | Embed) -> nnx.Param:
    """Returns the matrices [..., in, out] that an adapter of the module changes."""
    return module.embedding if isinstance(module, Embed) else module.kernel


def _default_targets(modules: dict[str, Any]) -> list[str]:
    """Returns the projections of the blocks, but for the gate of a shared MLP, which projects to one number."""
    return [path for path in modules if path.startswith("runs.") and not path.endswith(".shared_gate")]


def _matching(key: str, patterns: Sequence[str], paths: dict[str, Any], decoder: Decoder) -> list[str]:
    """Returns the paths in which any of the patterns is found; raises UserError for one that is found in none."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            matched = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise UserError(f"{key}: '{pattern}' is no regular expression: {error}.") from error
        if not matched:
            if decoder.spec.tied_head and re.search(pattern, "lm_head.kernel"):
                raise UserError(
                    f"{key}: '{pattern}' names the head, which this model ties to its embedding, so it cannot be changed on one "
                    "side only; 'embed' changes both."
                )
            near = difflib.get_close_matches(pattern, paths, n=_SHOWN, cutoff=0.3) or list(paths)[:_SHOWN]
            raise UserError(f"{key}: '{pattern}' matches nothing; paths are such as {', '.join(near)}.")
        found.update(matched)
    return [path for path in paths if path in found]


def _check_kind(module: nnx.Module, path: str, name: str, dropout: float, init: str) -> None:
    """Raises UserError for what the adapter of an embedding or of experts cannot have."""
    if not isinstance(module, Embed | ExpertLinear):
        return
    what = "an embedding" if isinstance(module, Embed) else "experts"
    remedy = f"name adapter.targets without {path}"
    if name == "dora":
        raise UserError(f"adapter.name: {path} is {what}, whose adapters have no magnitudes; use lora, or {remedy}.")
    if isinstance(module, ExpertLinear) and dropout:
        raise UserError(f"adapter.dropout: {path} is experts, whose adapters have no dropout; set it to 0, or {remedy}.")
    if isinstance(module, Embed) and init != "default":
        raise UserError(f"adapter.init: {path} is an embedding, which can only begin with zero; use default, or {remedy}.")


def _check_tokens(decoder: Decoder, tokens: Sequence[int], chosen: Iterable[str], trained: Iterable[str]) -> None:
    if not tokens:
        return
    if tokens[0] < 0 or tokens[-1] >= decoder.spec.vocab_size:
        wrong = tokens[0] if tokens[0] < 0 else tokens[-1]
        raise UserError(f"adapter.tokens: {wrong} is outside of the model's vocabulary of {decoder.spec.vocab_size}.")
    taken = [path for path in (*chosen, *trained) if path in ("embed", "lm_head", "embed.embedding", "lm_head.kernel")]
    if taken:
        raise UserError(f"adapter.tokens: rows of {taken[0]} are trained anyway; leave one of the two out.")
