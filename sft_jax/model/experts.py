"""A mixture of experts: each token goes to the few that its router chooses, and none is dropped.

How tokens reach their experts is in sft_jax.model.grouped.

Letters: B rows, L length, N = B * L tokens, D hidden size, E experts, k experts of a token.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from sft_jax.model.grouped import mix
from sft_jax.model.layers import ExpertLinear, Linear
from sft_jax.model.low_rank import split_key
from sft_jax.model.mlp import Mlp
from sft_jax.model.options import Options, unrounded
from sft_jax.model.product import gathered
from sft_jax.model.qat import Unrounded
from sft_jax.model.quant import Kernel, QuantisedKernel
from sft_jax.model.rounding import widened
from sft_jax.model.sharding import LAYOUT, is_variable, mesh_axes_for
from sft_jax.model.spec import ExpertsSpec, MlpSpec, RouterSpec

_GATHERED_OVER = LAYOUT["expert_embed"]


class Choice(NamedTuple):
    """Which experts tokens use."""

    experts: jax.Array  # int32 [B, L, k]
    weights: jax.Array  # fp32 [B, L, k]
    scores: jax.Array  # fp32 [B, L, E]
    logits: jax.Array  # fp32 [B, L, E]


class Routed(NamedTuple):
    """How evenly tokens were spread, as numbers a token that the loss weighs like its own."""

    balance: jax.Array  # fp32 [B, L], see `balance`
    z: jax.Array  # fp32 [B, L], the squared log of the sum of exponentials of the router's logits
    load: jax.Array  # fp32 [E], choices of each expert by tokens that are no padding


class Experts(nnx.Module):
    """sum of weight * expert(x) over the chosen experts, plus the shared MLP where there is one."""

    def __init__(self, spec: ExpertsSpec, hidden_size: int, key: jax.Array, deviation: float, dtype, options: Options):
        keys = jax.random.split(key, 6)
        rest = (deviation, dtype, options)
        wide, narrow = (hidden_size, spec.size), (spec.size, hidden_size)
        self.router = Linear((hidden_size, spec.count), ("embed", "router"), spec.router.bias, keys[0], *rest)
        correction = jnp.zeros((spec.count,), jnp.float32)  # rounded, it would change which experts are chosen
        self.correction = nnx.Param(correction, axes=("norm",), exact=True) if spec.router.correction else None
        self.gate = ExpertLinear(spec.count, wide, ("expert_embed", "mlp"), spec.bias, keys[1], *rest)
        self.up = ExpertLinear(spec.count, wide, ("expert_embed", "mlp"), spec.bias, keys[2], *rest)
        self.down = ExpertLinear(spec.count, narrow, ("mlp", "expert_embed"), spec.bias, keys[3], *rest)
        shared = MlpSpec(spec.shared_size, gated=True, activation=spec.activation, bias=False)
        self.shared = Mlp(shared, hidden_size, keys[4], *rest) if spec.shared_size is not None else None
        rest = (deviation, dtype, unrounded(options))
        self.shared_gate = Linear((hidden_size, 1), ("embed", None), False, keys[5], *rest) if spec.shared_gate else None
        self.spec = spec
        self.options = options

    def __call__(
        self, x: jax.Array, segments: jax.Array | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routed | None]:
        """Maps x [B, L, D] to [B, L, D]; with `segments` [B, L] also says how the documents were routed.

        `key` is that of dropout in the adapters of the shared MLP; those of experts have none.
        """
        choice = self.route(x)
        y = self._mix(x, choice)
        if self.shared is not None:
            shared_key, gate_key = split_key(key, 2)
            shared = self.shared(x, shared_key)
            if self.shared_gate is not None:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x, gate_key))
            y = y + shared
        return y, None if segments is None else routed(choice, self.spec, segments)

    def route(self, x: jax.Array) -> Choice:
        """Returns the choice for every token of x [B, L, D], in float32 at the highest precision."""
        logits = jnp.dot(
            x.astype(jnp.float32), widened(self.router.kernel[...]), precision=jax.lax.Precision.HIGHEST
        )
        if self.router.bias is not None:
            logits = logits + widened(self.router.bias[...])
        correction = None if self.correction is None else jax.lax.stop_gradient(self.correction[...].astype(jnp.float32))
        chosen, tokens = partial(choose, spec=self.spec.router, chosen=self.spec.chosen), self._tokens(x)
        if tokens is not None:  # else XLA gathers the scores of all tokens on every device, to sort them
            chosen = jax.shard_map(chosen, mesh=self.options.mesh, in_specs=(tokens, P()), out_specs=tokens, check_vma=False)
        return chosen(logits, correction)

    def _tokens(self, x: jax.Array) -> P | None:
        """Returns how tokens of x [B, L, ...] lie on the mesh; None where each device has all of them."""
        mesh = self.options.mesh
        if mesh is None or not mesh_axes_for(mesh, "batch", len(x)):
            return None
        return P(LAYOUT["batch"], mesh_axes_for(mesh, "length", x.shape[1]))

    def _mix(self, x: jax.Array, choice: Choice) -> jax.Array:
        """Returns the weighted sum of the chosen experts' outputs, [B, L, D].

        Over a mesh each device sorts the tokens that it has: its own, with all experts gathered, or where experts are cut
        over `expert` those of all devices along that axis, for the experts that are its own. Their inner size is cut over
        `tensor`. Sorting over devices would send every token everywhere.
        """
        kernels = tuple(part.operand() for part in (self.gate, self.up, self.down))
        adapters = tuple(part.adapter for part in (self.gate, self.up, self.down))
        biases = None
        if self.spec.bias:
            biases = tuple(widened(part.bias[...]) for part in (self.gate, self.up, self.down))
        mesh, grouped, tokens = self.options.mesh, partial(mix, spec=self.spec, options=self.options), self._tokens(x)
        if tokens is None:
            return grouped(x, choice.experts, choice.weights, kernels, adapters, biases)
        parts = (self.gate, self.up, self.down)
        biased = (P("expert", "tensor"), P("expert", "tensor"), P()) if biases is not None else None
        made_whole = tuple(_needs_all_inputs(kernel, mesh.shape["tensor"]) for kernel in kernels)

        def on_device(x, experts, weights, kernels, adapters, biases):
            kernels = tuple(
                kernel if isinstance(kernel, QuantisedKernel) else gathered(kernel, dimension, _GATHERED_OVER, self.options.dtype)
                for kernel, dimension in zip(kernels, (1, 1, 2), strict=True)
            )
            return grouped(x, experts, weights, kernels, adapters, biases, mesh=mesh)

        def over_mesh(x, experts, weights, kernels, adapters, biases):
            # In float32, as their gradients, which devices add up; it is as numbers of the compute dtype that they travel.
            kernels = tuple(
                kernel if isinstance(kernel, QuantisedKernel) and not whole else _widened(kernel)
                for kernel, whole in zip(kernels, made_whole, strict=True)
            )
            return jax.shard_map(
                on_device, mesh=mesh, check_vma=False, out_specs=tokens,
                in_specs=(
                    tokens, tokens, tokens, tuple(map(_kernel_layout, kernels, parts)),
                    jax.tree.map(_parameter_layout, adapters, is_leaf=is_variable), biased,
                ),
            )(x, experts, weights, kernels, adapters, biases)  # fmt: skip

        if any(made_whole):
            over_mesh = jax.checkpoint(over_mesh, prevent_cse=False)  # what is made is not kept
        return over_mesh(x, choice.experts, choice.weights, kernels, adapters, biases)


def _widened(kernel: Kernel) -> jax.Array:
    return widened(kernel) if isinstance(kernel, jax.Array) else kernel.astype(jnp.float32)


def _parameter_layout(parameter: nnx.Variable) -> nnx.Variable:
    """Returns a parameter with its partition in place of its value: cut over `expert` and `tensor` where kernels are."""
    shape = parameter.get_value().shape
    axes = parameter.axes[-len(shape) :]  # without that of layers, which the scan has taken
    names = {"expert": "expert", "mlp": "tensor", "expert_side": "tensor"}
    return parameter.replace(P(*(names.get(axis) if size != 1 else None for axis, size in zip(axes, shape, strict=True))))


def _needs_all_inputs(kernel: Kernel, pieces: int) -> bool:
    """Returns whether the numbers of a kernel are to be made before its inputs are cut into so many pieces.

    What QAT rounds has scales of all inputs; of NF4 a block may not be cut.
    """
    return not kernel.divides(pieces) if isinstance(kernel, QuantisedKernel) else isinstance(kernel, Unrounded)


def _kernel_layout(kernel: Kernel, part: ExpertLinear) -> P | QuantisedKernel:
    """Returns the partition of a kernel: of numbers that of the parameter, of codes and scales `_parameter_layout`."""
    if isinstance(kernel, QuantisedKernel):
        return jax.tree.map(_parameter_layout, kernel, is_leaf=is_variable)
    return P(*(LAYOUT[axis] for axis in part.kernel.axes[-3:]))


def choose(logits: jax.Array, correction: jax.Array | None, spec: RouterSpec, chosen: int) -> Choice:
    """Returns the `chosen` experts of each token and their weights, from fp32 logits [B, L, E]."""
    scores = jax.nn.sigmoid(logits) if spec.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    ranking = jax.lax.stop_gradient(scores if correction is None else scores + correction)
    if spec.groups > 1:
        grouped = ranking.reshape(*ranking.shape[:-1], spec.groups, -1)
        best = grouped.max(axis=-1) if spec.group_score == "max" else jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        _, allowed = jax.lax.top_k(best, spec.chosen_groups)
        open_groups = jnp.any(allowed[..., None] == jnp.arange(spec.groups), axis=-2)
        ranking = jnp.where(open_groups[..., None], grouped, -jnp.inf).reshape(ranking.shape)
    _, experts = jax.lax.top_k(ranking, chosen)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if spec.normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Choice(experts, weights * spec.scale, scores, logits)


def routed(choice: Choice, spec: ExpertsSpec, segments: jax.Array) -> Routed:
    """Returns the numbers that the auxiliary losses are made of.

    `balance` is, for a token of document d, E * sum over experts of f * p: f is the share of d's tokens that chose the
    expert (so that they sum to k) and p the token's normalised score. Its mean over a document is the sequence-wise balance
    loss of DeepSeek-V3 (arXiv:2412.19437, eq. 17), k where documents are spread evenly, and the loss of Switch
    Transformers (arXiv:2101.03961, eq. 4) times k for a batch of one document. Since it never leaves a document, k
    micro-batches give what one batch gives.
    """
    picked = jax.nn.one_hot(choice.experts, spec.count, dtype=jnp.float32).sum(axis=-2)  # [B, L, E]
    real = segments > 0

    def shares(picked, segments):
        documents = segments.shape[0] + 1
        chosen = jax.ops.segment_sum(picked, segments, documents)
        tokens = jax.ops.segment_sum(jnp.ones_like(segments, jnp.float32), segments, documents)
        return (chosen / jnp.maximum(tokens, 1.0)[:, None])[segments]

    share = jax.lax.stop_gradient(jax.vmap(shares)(picked, segments))
    normalised = choice.scores / jnp.sum(choice.scores, axis=-1, keepdims=True)
    return Routed(
        balance=jnp.where(real, spec.count * jnp.sum(share * normalised, axis=-1), 0.0),
        z=jnp.where(real, jnp.square(jax.nn.logsumexp(choice.logits, axis=-1)), 0.0),
        load=jnp.sum(jnp.where(real[..., None], picked, 0.0), axis=(0, 1)),
    )
