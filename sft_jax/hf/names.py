"""The table of names: which tensor of a Hugging Face checkpoint is which parameter of the decoder.

One table for the families whose blocks are attention and a gated MLP: Llama, Mistral, Gemma 2 and Gemma 3. What a
model does not have (biases, norms after the sublayers, a head of its own) its spec leaves out.
"""

from sft_jax.hf.rules import Rule
from sft_jax.model.spec import DecoderSpec

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# Tensors that older exports contain and that are no parameters: regular expressions over the whole name.
IGNORED = (
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # a buffer that config.json determines
)

_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_MLP = ("gate", "up", "down")


def rules(spec: DecoderSpec) -> list[Rule]:
    """Returns the rules of a model, in the order in which tensors are written."""
    table = [Rule(EMBEDDING, "embed.embedding"), _norm("input_layernorm", "attention_norm")]
    biases = {"query": spec.query_bias, "key": spec.query_bias, "value": spec.query_bias, "output": spec.output_bias}
    for ours, theirs in _PROJECTIONS.items():
        table += _linear(f"self_attn.{theirs}", f"attention.{ours}", biases[ours])
    if spec.query_key_norm:
        table += [
            _norm(f"self_attn.{theirs}_norm", f"attention.{ours}_norm")
            for theirs, ours in (("q", "query"), ("k", "key"))
        ]
    if spec.post_norms:
        table += [
            _norm("post_attention_layernorm", "post_attention_norm"),
            _norm("pre_feedforward_layernorm", "mlp_norm"),
            _norm("post_feedforward_layernorm", "post_mlp_norm"),
        ]
    else:
        table.append(_norm("post_attention_layernorm", "mlp_norm"))
    for part in _MLP:
        table += _linear(f"mlp.{part}_proj", f"mlp.{part}", spec.layers[0].mlp.bias)
    table.append(Rule("model.norm.weight", "final_norm.scale"))
    if not spec.tied_head:
        table.append(Rule(HEAD, "lm_head.kernel", transpose=True))
    return table


def ignored(spec: DecoderSpec) -> tuple[str, ...]:
    """Returns regular expressions of tensors that may be there and hold no parameter of this model."""
    return (*IGNORED, HEAD.replace(".", r"\.")) if spec.tied_head else IGNORED


def _norm(theirs: str, ours: str) -> Rule:
    return Rule(f"model.layers.{{layer}}.{theirs}.weight", f"{ours}.scale")


def _linear(theirs: str, ours: str, bias: bool) -> list[Rule]:
    kernel = Rule(f"model.layers.{{layer}}.{theirs}.weight", f"{ours}.kernel", transpose=True)
    return [kernel, Rule(f"model.layers.{{layer}}.{theirs}.bias", f"{ours}.bias")] if bias else [kernel]
