"""What a decoder computes, as frozen data. Every difference between model families is a field here.

No field has a default: each number comes from the checkpoint's config.json (`sft_jax.model.families`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int  # tokens of context before scaling


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) over the whole head, halves rotated."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | None


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between the layers of one decoder."""

    window: int | None  # a query sees itself and the window - 1 tokens before it; None = all before it
    rope: RopeSpec


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    heads: int
    kv_heads: int
    head_size: int
    layers: tuple[LayerSpec, ...]  # in the order of the checkpoint
    activation: str  # of the gated MLP, see sft_jax.model.layers.ACTIVATIONS
    norm_epsilon: float
    norm_offset: float  # RMSNorm multiplies by (scale + norm_offset): 0 for Llama, 1 for Gemma
    post_norms: bool  # norms also after attention and after the MLP, before the residual is added
    qk_norm: bool  # RMSNorm over the head of queries and keys, before rope
    query_bias: bool  # of the query, key and value projections
    output_bias: bool  # of the attention output projection
    mlp_bias: bool
    attention_scale: float  # scores are q.k * attention_scale
    attention_soft_cap: float | None  # scores become cap * tanh(scores / cap)
    logit_soft_cap: float | None  # the same for the final logits
    embedding_scale: float  # token embeddings are multiplied by it: 1 for Llama, sqrt(hidden size) for Gemma
    tied_head: bool  # the head is the transposed embedding
    initializer_range: float  # standard deviation of new weights
