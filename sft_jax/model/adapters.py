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
from sft_jax.model.quant import Kernel, QuantisedKernel
from sft_jax.model.sharding import named_leaves
from sft_jax.model.vocabulary import stored_shape

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
    tokens: tuple[int, ...]  # ids whose rows of the embedding are trained, ascending; of a tied head too
    head_tokens: tuple[int, ...]  # ids whose columns of a head of its own are trained, ascending
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
        tokens = set(self.tokens) | set(self.head_tokens)
        parts += [f"rows of {len(tokens)} tokens"] if tokens else []
        parts += [f"{', '.join(self.trained)} whole"] if self.trained else []
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterPlan":
        """Returns the plan of which `values` are the `to_dict`, also after a way through JSON."""
        modules = tuple(ModulePlan(**module) for module in values["modules"])
        ids = (tuple(values[name]) for name in ("tokens", "head_tokens"))
        return cls(modules, values["dropout"], *ids, tuple(values["trained"]), values["rslora"])


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
    gate of a shared MLP, which projects to one number, has nothing that a rank could save, so only `train` finds it. The
    product of the matrices is scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora` (arXiv:2312.03732).

    Raises UserError naming the key where a pattern matches nothing, a rank is too large, or two keys contradict each other.
    """
    modules = {path: module for path, module in adaptable(decoder) if not path.endswith(".shared_gate")}
    chosen = _matching("adapter.targets", targets, modules, decoder) if targets else dict(block_projections(decoder))
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    plans = []
    for path in chosen:
        shape = kernel_values(modules[path]).shape
        if rank > min(shape[-2:]):
            raise UserError(
                f"adapter.rank: {rank} is larger than {path} {list(shape[-2:])} allows; at most {min(shape[-2:])}, or name "
                "adapter.targets without it."
            )
        plans.append(ModulePlan(path, rank, scale, magnitude=name == "dora", start=init == "pissa"))
    trained = _matching("adapter.train", train, base_shapes(decoder), decoder) if train else []
    for path in trained:
        if path.rpartition(".")[0] in chosen and path.rpartition(".")[2] in ("kernel", "embedding"):
            raise UserError(
                f"adapter.train: matches {path}, which carries an adapter; leave it out here or in adapter.targets."
            )
    tokens = tuple(sorted(set(tokens)))
    if tokens and (tokens[0] < 0 or tokens[-1] >= decoder.spec.vocab_size):
        wrong = tokens[0] if tokens[0] < 0 else tokens[-1]
        raise UserError(f"adapter.tokens: {wrong} is outside of the model's vocabulary of {decoder.spec.vocab_size}.")
    head_tokens = () if decoder.spec.tied_head else tokens
    plan = AdapterPlan(tuple(plans), dropout, tokens, head_tokens, tuple(trained), rslora)
    check_plan(plan, decoder)
    return plan


def check_plan(plan: AdapterPlan, decoder: Decoder) -> None:
    """Raises UserError where `plan` asks for what is not computed, also if it is that of an adapter from elsewhere."""
    for module in plan.modules:
        _check_kind(module, module_at(decoder, module.path), plan.dropout)
    held = {path for path, _ in named_leaves(decoder)}
    for path in plan.trained:
        if path not in held:
            raise UserError(
                f"adapter.train: {path} is trained whole, but it is quantised (adapter.base_dtype), which cannot be trained; leave "
                "it out, or leave out adapter.base_dtype."
            )
    whole = {*plan.trained, *(module.path for module in plan.modules)}
    for ids, paths in ((plan.tokens, ("embed", "embed.embedding")), (plan.head_tokens, ("lm_head", "lm_head.kernel"))):
        taken = [path for path in paths if ids and path in whole]
        if taken:
            raise UserError(
                f"adapter.tokens: rows of {taken[0]} are trained beside those of {len(ids)} tokens; leave one of the two out, or "
                "merge such an adapter with the library that has made it."
            )


def adaptable(decoder: Decoder) -> list[tuple[str, Linear | ExpertLinear | Embed]]:
    """Returns the modules that can carry an adapter, by path, in the order of the parameters.

    Routers cannot: they choose in float32, and are small enough to be trained whole.
    """
    found: dict[str, Any] = {}
    for path, _ in named_leaves(decoder):
        module = path.rpartition(".")[0].removesuffix(".kernel")  # of a quantised one
        if module not in found and not module.endswith(".mlp.router") and "adapter" not in path.split("."):
            node = module_at(decoder, module) if module else None
            if isinstance(node, Linear | ExpertLinear | Embed):
                found[module] = node
    return list(found.items())


def base_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the base's parameters by path as they are in a checkpoint, of quantised kernels too."""
    shapes = {path: stored_shape(leaf, decoder.spec) for path, leaf in named_leaves(decoder) if not is_adapter(path)}
    for path, module in block_projections(decoder):
        if isinstance(module.kernel, QuantisedKernel):
            del shapes[f"{path}.kernel.codes"], shapes[f"{path}.kernel.scales"]
            shapes[f"{path}.kernel"] = module.kernel.shape
    return shapes


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


def kernel_of(module: Linear | ExpertLinear | Embed) -> nnx.Param | QuantisedKernel:
    """Returns the matrices [..., in, out] that an adapter of the module changes."""
    return module.embedding if isinstance(module, Embed) else module.kernel


def kernel_values(module: Linear | ExpertLinear | Embed) -> Kernel:
    """Returns the same without its metadata: an array, abstract or not, or a quantised kernel."""
    kernel = kernel_of(module)
    return kernel if isinstance(kernel, QuantisedKernel) else kernel.get_value()


def block_projections(decoder: Decoder) -> list[tuple[str, Linear | ExpertLinear]]:
    """Returns the projections of the blocks by path, but for the gate of a shared MLP, which projects to one number."""
    modules = adaptable(decoder)
    return [(path, node) for path, node in modules if path.startswith("runs.") and not path.endswith(".shared_gate")]


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


def _check_kind(plan: ModulePlan, module: nnx.Module, dropout: float) -> None:
    """Raises UserError for what the adapter of an embedding or of experts cannot have."""
    if not isinstance(module, Embed | ExpertLinear):
        return
    what = "an embedding" if isinstance(module, Embed) else "experts"
    remedy = f"name adapter.targets without {plan.path}, or merge an adapter from elsewhere with the library that has made it"
    if plan.magnitude:
        raise UserError(f"adapter.name: {plan.path} is {what}, whose adapters have no magnitudes here; use lora, {remedy}.")
    if isinstance(module, ExpertLinear) and dropout:
        raise UserError(f"adapter.dropout: {plan.path} is experts, whose adapters have no dropout; set it to 0, or {remedy}.")
    if isinstance(module, Embed) and plan.start:
        raise UserError(f"adapter.init: {plan.path} is an embedding, which can only begin with zero; use default, or {remedy}.")
