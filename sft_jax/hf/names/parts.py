"""The parts of which the names of a decoder's body are made; most families differ from Llama in one or two of them.

A part gives the rules of one block, whose names begin behind the prefix of the layer. What a model does not have (biases,
norms behind the sublayers) its spec leaves out.
"""

import dataclasses
from collections.abc import Callable, Sequence

from sft_jax.hf.rules import Rule
from sft_jax.model.spec import DecoderSpec, ExpertsSpec

Part = Callable[[DecoderSpec], list[Rule]]  # rules of one block, without the prefix of the layer

_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
BOTH_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def _weight(theirs: str, ours: str, bias: bool, transpose: bool = True, layers: Sequence[int] | None = None) -> list[Rule]:
    """Returns the rules of one linear map; biases are never transposed."""
    kernel = Rule(f"{theirs}.weight", f"{ours}.kernel", transpose, layers=layers)
    return [kernel, Rule(f"{theirs}.bias", f"{ours}.bias", layers=layers)] if bias else [kernel]


def _joint(theirs: str, ours: Sequence[str], bias: bool, transpose: bool = True) -> list[Rule]:
    """Returns the rules of several linear maps that lie side by side in one tensor."""
    rules = [Rule(f"{theirs}.weight", tuple(f"{name}.kernel" for name in ours), transpose, axis=0 if transpose else -1)]
    return [*rules, Rule(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))] if bias else rules


def _norms(names: dict[str, str]) -> Part:
    """Norms of a block by our name; those behind attention and MLP where the model has them."""

    def part(spec: DecoderSpec) -> list[Rule]:
        present = {ours: theirs for ours, theirs in names.items() if spec.post_norms or not ours.startswith("post")}
        return [rule for ours, theirs in present.items() for rule in _norm(theirs, ours, spec.norm.bias)]

    return part


def _norm(theirs: str, ours: str, bias: bool) -> list[Rule]:
    scale = Rule(f"{theirs}.weight", f"{ours}.scale")
    return [scale, Rule(f"{theirs}.bias", f"{ours}.bias")] if bias else [scale]


def attention(
    folder: str = "self_attn", output: str = "o_proj", fused: str | None = None, transpose: bool = True
) -> Part:
    """Plain attention; `fused` names the one tensor of queries, keys and values."""

    def part(spec: DecoderSpec) -> list[Rule]:
        if fused is None:
            rules = [
                rule
                for ours, theirs in _QKV.items()
                for rule in _weight(f"{folder}.{theirs}", f"attention.{ours}", spec.query_bias, transpose)
            ]
        else:
            ours = [f"attention.{name}" for name in _QKV]
            rules = _joint(f"{folder}.{fused}", ours, spec.query_bias, transpose)
        rules += _weight(f"{folder}.{output}", "attention.output", spec.output_bias, transpose)
        if spec.query_key_norm:
            rules += [Rule(f"{folder}.{name[0]}_norm.weight", f"attention.{name}_norm.scale") for name in ("query", "key")]
        if spec.sinks:
            rules.append(Rule(f"{folder}.sinks", "attention.sinks"))
        return rules

    return part


def latent_attention(spec: DecoderSpec) -> list[Rule]:
    latent = spec.latent
    if latent.query_rank is None:
        rules = _weight("self_attn.q_proj", "attention.query", False)
    else:
        rules = _weight("self_attn.q_a_proj", "attention.query_down", latent.bias)
        rules += _norm("self_attn.q_a_layernorm", "attention.query_norm", False)
        rules += _weight("self_attn.q_b_proj", "attention.query_up", False)
    rules += _weight("self_attn.kv_a_proj_with_mqa", "attention.latent_down", latent.bias)
    rules += _norm("self_attn.kv_a_layernorm", "attention.latent_norm", False)
    rules += _weight("self_attn.kv_b_proj", "attention.latent_up", False)
    return rules + _weight("self_attn.o_proj", "attention.output", spec.output_bias)


def mlp(folder: str = "mlp", names: dict[str, str] = _MLP, fused: str | None = None, transpose: bool = True) -> Part:
    """The MLP of the layers that have no experts; `fused` names the one tensor of gate and up."""

    def part(spec: DecoderSpec) -> list[Rule]:
        layers = [i for i, layer in enumerate(spec.layers) if not isinstance(layer.mlp, ExpertsSpec)]
        if not layers:
            return []
        spec_of_mlp = spec.layers[layers[0]].mlp
        everywhere = None if len(layers) == len(spec.layers) else layers
        wanted = names if spec_of_mlp.gated else {ours: theirs for ours, theirs in names.items() if ours != "gate"}
        if fused is not None:
            rules = _joint(f"{folder}.{fused}", ("mlp.gate", "mlp.up"), spec_of_mlp.bias, transpose)
            wanted = {"down": names["down"]}
        else:
            rules = []
        for ours, theirs in wanted.items():
            rules += _weight(f"{folder}.{theirs}", f"mlp.{ours}", spec_of_mlp.bias, transpose, everywhere)
        return rules

    return part


def experts(
    folder: str = "mlp",
    router: str = "gate",
    names: dict[str, str] = _MLP,
    shared: str | None = None,
    shared_gate: str | None = None,
) -> Part:
    """Experts with one tensor each; the layers that have none are those of `mlp`."""

    def part(spec: DecoderSpec) -> list[Rule]:
        layers = [i for i, layer in enumerate(spec.layers) if isinstance(layer.mlp, ExpertsSpec)]
        mixture = spec.layers[layers[0]].mlp
        everywhere = None if len(layers) == len(spec.layers) else layers
        rules = _weight(f"{folder}.{router}", "mlp.router", mixture.router.bias, layers=everywhere)
        if mixture.router.correction:
            rules.append(Rule(f"{folder}.{router}.e_score_correction_bias", "mlp.correction", layers=everywhere))
        for ours, theirs in names.items():
            hf = f"{folder}.experts.{{expert}}.{theirs}.weight"
            rules.append(Rule(hf, f"mlp.{ours}.kernel", transpose=True, layers=everywhere))
        if mixture.shared_size is not None:
            for ours, theirs in _MLP.items():
                rules += _weight(f"{folder}.{shared}.{theirs}", f"mlp.shared.{ours}", False, layers=everywhere)
        if mixture.shared_gate:
            rules += _weight(f"{folder}.{shared_gate}", "mlp.shared_gate", False, layers=everywhere)
        return rules

    return part


def gpt_oss_experts(spec: DecoderSpec) -> list[Rule]:
    """Experts of a layer in one tensor [E, in, out], gate and up in turns."""
    both = ("mlp.gate", "mlp.up")
    return [
        *_weight("mlp.router", "mlp.router", True),
        Rule("mlp.experts.gate_up_proj", tuple(f"{name}.kernel" for name in both), axis=-1, interleaved=True),
        Rule("mlp.experts.gate_up_proj_bias", tuple(f"{name}.bias" for name in both), axis=-1, interleaved=True),
        Rule("mlp.experts.down_proj", "mlp.down.kernel"),
        Rule("mlp.experts.down_proj_bias", "mlp.down.bias"),
    ]


def granite_experts(spec: DecoderSpec) -> list[Rule]:
    """Experts of a layer in one tensor [E, out, in], gate before up; the shared MLP beside them likewise."""
    rules = [
        *_weight("block_sparse_moe.router.layer", "mlp.router", False),
        Rule("block_sparse_moe.input_linear.weight", ("mlp.gate.kernel", "mlp.up.kernel"), transpose=True, axis=1),
        Rule("block_sparse_moe.output_linear.weight", "mlp.down.kernel", transpose=True),
    ]
    if spec.layers[0].mlp.shared_size is not None:
        rules += _joint("shared_mlp.input_linear", ("mlp.shared.gate", "mlp.shared.up"), False)
        rules += _weight("shared_mlp.output_linear", "mlp.shared.down", False)
    return rules


def body(
    norms: dict[str, str] = PRE_NORMS,
    attention: Part = attention(),
    mlp: Part | tuple[Part, ...] = mlp(),
    *,
    layer: str = "layers.{layer}.",
    embedding: str = "embed_tokens.weight",
    positions: str | None = None,
    final_norm: str = "norm",
) -> Part:
    """Returns the rules of everything but the head, below the root; without arguments those of Llama."""
    parts = (_norms(norms), attention, *(mlp if isinstance(mlp, tuple) else (mlp,)))

    def rules(spec: DecoderSpec) -> list[Rule]:
        table = [Rule(embedding, "embed.embedding")]
        if positions is not None:
            table.append(Rule(positions, "embed.positions"))
        for part in parts:
            table += [dataclasses.replace(rule, hf=layer + rule.hf) for rule in part(spec)]
        return table + _norm(final_norm, "final_norm", spec.norm.bias)

    return rules
