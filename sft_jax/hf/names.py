"""The tables of names: which tensor of a Hugging Face checkpoint is which parameter of the decoder.

A family is one entry of NAMES. Most are `_entry(...)` with the names in which they differ from Llama; what a model does
not have (biases, norms behind the sublayers, a head of its own) its spec leaves out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sft_jax.hf.rules import Rule
from sft_jax.model.spec import DecoderSpec, ExpertsSpec

Part = Callable[[DecoderSpec], list[Rule]]  # rules of one block, without the prefix of the layer

_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_BOTH_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def _weight(theirs: str, ours: str, bias: bool, transpose: bool = True, layers: Sequence[int] | None = None) -> list[Rule]:
    """Returns the rules of one linear map; biases are never transposed."""
    kernel = Rule(f"{theirs}.weight", f"{ours}.kernel", transpose, layers=layers)
    return [kernel, Rule(f"{theirs}.bias", f"{ours}.bias", layers=layers)] if bias else [kernel]


def _joint(theirs: str, ours: Sequence[str], bias: bool, transpose: bool = True) -> list[Rule]:
    """Returns the rules of several linear maps that lie side by side in one tensor."""
    rules = [Rule(f"{theirs}.weight", tuple(f"{name}.kernel" for name in ours), transpose, axis=0 if transpose else -1)]
    return [*rules, Rule(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))] if bias else rules


def _norms(names: dict[str, str]) -> Part:
    """Norms of a block by our name."""

    def part(spec: DecoderSpec) -> list[Rule]:
        return [rule for ours, theirs in names.items() for rule in _norm(theirs, ours, spec.norm.bias)]

    return part


def _norm(theirs: str, ours: str, bias: bool) -> list[Rule]:
    scale = Rule(f"{theirs}.weight", f"{ours}.scale")
    return [scale, Rule(f"{theirs}.bias", f"{ours}.bias")] if bias else [scale]


def _attention(
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


def _latent_attention(spec: DecoderSpec) -> list[Rule]:
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


def _mlp(folder: str = "mlp", names: dict[str, str] = _MLP, fused: str | None = None, transpose: bool = True) -> Part:
    """The MLP of the layers that have no experts; `fused` names the one tensor of gate and up."""

    def part(spec: DecoderSpec) -> list[Rule]:
        layers = [i for i, layer in enumerate(spec.layers) if not isinstance(layer.mlp, ExpertsSpec)]
        if not layers:
            return []
        mlp = spec.layers[layers[0]].mlp
        everywhere = None if len(layers) == len(spec.layers) else layers
        wanted = names if mlp.gated else {ours: theirs for ours, theirs in names.items() if ours != "gate"}
        if fused is not None:
            rules = _joint(f"{folder}.{fused}", ("mlp.gate", "mlp.up"), mlp.bias, transpose)
            wanted = {"down": names["down"]}
        else:
            rules = []
        for ours, theirs in wanted.items():
            rules += _weight(f"{folder}.{theirs}", f"mlp.{ours}", mlp.bias, transpose, everywhere)
        return rules

    return part


def _experts(
    folder: str = "mlp",
    router: str = "gate",
    names: dict[str, str] = _MLP,
    shared: str | None = None,
    shared_gate: str | None = None,
) -> Part:
    """Experts with one tensor each; the layers that have none are those of `_mlp`."""

    def part(spec: DecoderSpec) -> list[Rule]:
        layers = [i for i, layer in enumerate(spec.layers) if isinstance(layer.mlp, ExpertsSpec)]
        experts = spec.layers[layers[0]].mlp
        everywhere = None if len(layers) == len(spec.layers) else layers
        rules = _weight(f"{folder}.{router}", "mlp.router", experts.router.bias, layers=everywhere)
        if experts.router.correction:
            rules.append(Rule(f"{folder}.{router}.e_score_correction_bias", "mlp.correction", layers=everywhere))
        for ours, theirs in names.items():
            hf = f"{folder}.experts.{{expert}}.{theirs}.weight"
            rules.append(Rule(hf, f"mlp.{ours}.kernel", transpose=True, layers=everywhere))
        if experts.shared_size is not None:
            for ours, theirs in _MLP.items():
                rules += _weight(f"{folder}.{shared}.{theirs}", f"mlp.shared.{ours}", False, layers=everywhere)
        if experts.shared_gate:
            rules += _weight(f"{folder}.{shared_gate}", "mlp.shared_gate", False, layers=everywhere)
        return rules

    return part


def _gpt_oss_experts(spec: DecoderSpec) -> list[Rule]:
    """Experts of a layer in one tensor [E, in, out], gate and up in turns."""
    both = ("mlp.gate", "mlp.up")
    return [
        *_weight("mlp.router", "mlp.router", True),
        Rule("mlp.experts.gate_up_proj", tuple(f"{name}.kernel" for name in both), axis=-1, interleaved=True),
        Rule("mlp.experts.gate_up_proj_bias", tuple(f"{name}.bias" for name in both), axis=-1, interleaved=True),
        Rule("mlp.experts.down_proj", "mlp.down.kernel"),
        Rule("mlp.experts.down_proj_bias", "mlp.down.bias"),
    ]


def _granite_experts(spec: DecoderSpec) -> list[Rule]:
    """Experts of a layer in one tensor [E, out, in], gate before up."""
    return [
        *_weight("block_sparse_moe.router.layer", "mlp.router", False),
        Rule("block_sparse_moe.input_linear.weight", ("mlp.gate.kernel", "mlp.up.kernel"), transpose=True, axis=1),
        Rule("block_sparse_moe.output_linear.weight", "mlp.down.kernel", transpose=True),
    ]


@dataclass(frozen=True)
class NameTable:
    """The names of one architecture."""

    block: tuple[Part, ...]
    roots: tuple[str, ...] = ("model.",)
    layer: str = "layers.{layer}."
    embedding: str = "embed_tokens.weight"
    positions: str | None = None
    norm: str = "norm"
    heads: tuple[str, ...] = ("lm_head.weight",)

    def rules(self, spec: DecoderSpec, root: int = 0) -> list[Rule]:
        """Returns the rules of a model in the order in which tensors are written."""
        prefix = self.roots[root]
        table = [Rule(prefix + self.embedding, "embed.embedding")]
        if self.positions is not None:
            table.append(Rule(prefix + self.positions, "embed.positions"))
        for part in self.block:
            table += [
                Rule(prefix + self.layer + rule.hf, rule.params, rule.transpose, rule.axis, rule.interleaved, rule.layers)
                for rule in part(spec)
            ]
        table += _norm(prefix + self.norm, "final_norm", spec.norm.bias)
        if not spec.tied_head:
            table.append(Rule(self.heads[root], "lm_head.kernel", transpose=True))
        return table


def _entry(norms: dict[str, str] = _PRE_NORMS, attention: Part = _attention(), mlp: Part | tuple[Part, ...] = _mlp(), **names):
    return NameTable((_norms(norms), attention, *(mlp if isinstance(mlp, tuple) else (mlp,))), **names)


_POST_NORMS = {name: theirs for name, theirs in _BOTH_NORMS.items() if name.startswith("post")}
_GLM4_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_mlp_layernorm",
}
_PLAIN_MLP = _mlp(names={"up": "c_fc", "down": "c_proj"})
_FUSED_MLP = _mlp(fused="gate_up_proj")
_SHARED = _experts(shared="shared_experts")

NAMES: dict[str, NameTable] = {
    "ArceeForCausalLM": _entry(),
    "Cohere2ForCausalLM": _entry({"attention_norm": "input_layernorm"}),
    "CohereForCausalLM": _entry({"attention_norm": "input_layernorm"}),
    "DeepseekV2ForCausalLM": _entry(attention=_latent_attention, mlp=(_mlp(), _SHARED)),
    "DeepseekV3ForCausalLM": _entry(attention=_latent_attention, mlp=(_mlp(), _SHARED)),
    "Exaone4ForCausalLM": _entry(_POST_NORMS),
    "GPT2LMHeadModel": _entry(
        {"attention_norm": "ln_1", "mlp_norm": "ln_2"},
        _attention("attn", "c_proj", fused="c_attn", transpose=False),
        _mlp(names={"up": "c_fc", "down": "c_proj"}, transpose=False),
        roots=("transformer.", ""), layer="h.{layer}.", embedding="wte.weight", positions="wpe.weight", norm="ln_f",
        heads=("lm_head.weight", "lm_head.weight"),
    ),
    "Gemma2ForCausalLM": _entry(_BOTH_NORMS),
    "Gemma3ForCausalLM": _entry(_BOTH_NORMS),
    "Gemma3ForConditionalGeneration": _entry(
        _BOTH_NORMS, roots=("language_model.model.", "model.language_model."),
        heads=("language_model.lm_head.weight", "lm_head.weight"),
    ),
    "GemmaForCausalLM": _entry(),
    "Glm4ForCausalLM": _entry(_GLM4_NORMS, mlp=_FUSED_MLP),
    "Glm4MoeForCausalLM": _entry(mlp=(_mlp(), _SHARED)),
    "GlmForCausalLM": _entry(mlp=_FUSED_MLP),
    "GptOssForCausalLM": _entry(mlp=_gpt_oss_experts),
    "GraniteForCausalLM": _entry(),
    "GraniteMoeForCausalLM": _entry(mlp=_granite_experts),
    "HeliumForCausalLM": _entry(),
    "LlamaForCausalLM": _entry(),
    "Ministral3ForCausalLM": _entry(),
    "MinistralForCausalLM": _entry(),
    "MistralForCausalLM": _entry(),
    "MixtralForCausalLM": _entry(mlp=_experts("block_sparse_moe", names={"gate": "w1", "up": "w3", "down": "w2"})),
    "NemotronForCausalLM": _entry(),
    "Olmo2ForCausalLM": _entry(_POST_NORMS),
    "Olmo3ForCausalLM": _entry(_POST_NORMS),
    "OlmoeForCausalLM": _entry(mlp=_experts()),
    "Phi3ForCausalLM": _entry(attention=_attention(fused="qkv_proj"), mlp=_FUSED_MLP),
    "Qwen2ForCausalLM": _entry(),
    "Qwen2MoeForCausalLM": _entry(mlp=(_mlp(), _experts(shared="shared_expert", shared_gate="shared_expert_gate"))),
    "Qwen3ForCausalLM": _entry(),
    "Qwen3MoeForCausalLM": _entry(mlp=(_mlp(), _experts())),
    "SeedOssForCausalLM": _entry(),
    "SmolLM3ForCausalLM": _entry(),
    "StableLmForCausalLM": _entry(),
    "Starcoder2ForCausalLM": _entry(mlp=_PLAIN_MLP),
}  # fmt: skip

# Tensors that older exports contain and that are no parameters: regular expressions over the whole name.
IGNORED = (
    r"(.*\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # a buffer that config.json determines
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",  # GPT-2's causal mask
)


def name_table(config: dict) -> NameTable:
    """Returns the names of the model that `config`, a parsed config.json, describes."""
    return NAMES[config["architectures"][0]]


def ignored(table: NameTable, spec: DecoderSpec, root: int = 0) -> tuple[str, ...]:
    """Returns regular expressions of tensors that may be there and hold no parameter of this model."""
    return (*IGNORED, re.escape(table.heads[root])) if spec.tied_head else IGNORED
