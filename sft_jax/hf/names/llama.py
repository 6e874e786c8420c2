"""Names of decoders whose blocks are attention and a gated MLP, as Llama has them; most families follow these.

What a model does not have (biases, norms after the sublayers) its spec leaves out.
"""

from sft_jax.hf.rules import Rule
from sft_jax.model.spec import DecoderSpec


def body(spec: DecoderSpec) -> list[Rule]:
    """Returns the rules of Llama, Mistral, Gemma 2 and Gemma 3, below the root."""
    table = [Rule("embed_tokens.weight", "embed.embedding"), norm("input_layernorm", "attention_norm")]
    table += attention(spec)
    if spec.post_norms:
        table += [
            norm("post_attention_layernorm", "post_attention_norm"),
            norm("pre_feedforward_layernorm", "mlp_norm"),
            norm("post_feedforward_layernorm", "post_mlp_norm"),
        ]
    else:
        table.append(norm("post_attention_layernorm", "mlp_norm"))
    return [*table, *gated_mlp("mlp", "mlp", spec.mlp_bias), Rule("norm.weight", "final_norm.scale")]


def attention(spec: DecoderSpec) -> list[Rule]:
    """Returns the rules of projections and norms of `self_attn`."""
    table = []
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.items():
        table += linear(f"self_attn.{theirs}", f"attention.{ours}", spec.query_bias)
    table += linear("self_attn.o_proj", "attention.output", spec.output_bias)
    if spec.qk_norm:
        table += [norm("self_attn.q_norm", "attention.query_norm"), norm("self_attn.k_norm", "attention.key_norm")]
    return table


def gated_mlp(theirs: str, ours: str, bias: bool) -> list[Rule]:
    """Returns the rules of an MLP whose gate and up projection are tensors of their own."""
    return [
        rule for part in ("gate", "up", "down") for rule in linear(f"{theirs}.{part}_proj", f"{ours}.{part}", bias)
    ]


def norm(theirs: str, ours: str) -> Rule:
    return Rule(f"layers.{{layer}}.{theirs}.weight", f"{ours}.scale")


def linear(theirs: str, ours: str, bias: bool) -> list[Rule]:
    kernel = Rule(f"layers.{{layer}}.{theirs}.weight", f"{ours}.kernel", transpose=True)
    return [kernel, Rule(f"layers.{{layer}}.{theirs}.bias", f"{ours}.bias")] if bias else [kernel]
