"""What a decoder computes, as frozen data. Every difference between model families is a field here.

No field has a default: each number comes from the checkpoint's config.json (`sft_jax.model.families`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """The base grows with documents longer than `original_length` tokens ("dynamic NTK", transformers)."""

    factor: float
    original_length: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int  # tokens of context before scaling


@dataclass(frozen=True)
class YarnScaling:
    """As Llama 3's, by a ramp over channels instead of wavelengths (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    fast_turns: float  # channels that turn more often within the original length are kept,
    slow_turns: float  # those that turn less often are divided by `factor`
    original_length: int
    whole_channels: bool  # the ends of the ramp are rounded outward to whole channels


@dataclass(frozen=True)
class LongScaling:
    """A divisor for each pair of channels, another set for documents that are longer than `original_length` tokens
    (LongRoPE, Ding et al. 2024, arXiv:2402.13753)."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int


@dataclass(frozen=True)
class QueryGrowth:
    """Queries are multiplied by 1 + slope * log(1 + floor(position / length)) (Llama 4, Ministral 3)."""

    slope: float
    length: int


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of the first `size` channels of a head."""

    theta: float
    size: int
    interleaved: bool  # channel 2c is paired with 2c + 1; else c with c + size / 2
    scaling: LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongScaling | None
    magnitude: float  # what is rotated is also multiplied by it: 1 but for YaRN and LongRoPE
    query_growth: QueryGrowth | None


@dataclass(frozen=True)
class MlpSpec:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where it is not gated."""

    size: int
    gated: bool
    activation: str  # see sft_jax.model.mlp.ACTIVATIONS
    bias: bool


@dataclass(frozen=True)
class RouterSpec:
    """How a token chooses its experts and weighs what they return."""

    score: str  # of the router's logits: "softmax" or "sigmoid"
    bias: bool
    correction: bool  # a stored number an expert is added to its score for the choice only (DeepSeek-V3)
    groups: int  # experts lie in so many groups, of which a token may use `chosen_groups`
    chosen_groups: int
    group_score: str  # what a group is chosen by: "max" of its scores, or the sum of its two best, "top2"
    normalize: bool  # weights of the chosen experts are divided by their sum
    scale: float  # weights are multiplied by it in the end


@dataclass(frozen=True)
class ClampedGate:
    """The gate of GPT-OSS: g * sigmoid(slope * g) * (u + 1), with g at most `limit` and u within it on both sides."""

    slope: float
    limit: float


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of gated MLPs of which a router chooses some for each token (Shazeer et al. 2017, arXiv:1701.06538)."""

    count: int
    chosen: int  # experts that a token uses
    size: int  # of the inner layer of one expert
    activation: str | ClampedGate
    bias: bool  # of the experts' projections
    router: RouterSpec
    shared_size: int | None  # of an MLP beside the experts that every token uses; None = none
    shared_gate: bool  # the shared MLP's output is multiplied by the sigmoid of a projection of the token


@dataclass(frozen=True)
class LayerSpec:
    """What may differ between the layers of one decoder."""

    window: int | None  # a query sees itself and the window - 1 tokens before it; None = all before it
    rope: RopeSpec | None  # None = no rotary positions
    mlp: MlpSpec | ExpertsSpec


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) or LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

    kind: str  # "rms" or "layer"
    epsilon: float
    offset: float  # multiplies by (scale + offset): 0 for Llama, 1 for Gemma
    bias: bool


@dataclass(frozen=True)
class LatentSpec:
    """Attention whose keys and values are made from one small latent state a token (DeepSeek-V2, arXiv:2405.04434).

    A head has `plain_size` channels made from the latent states, and behind them `rope_size` channels with rope, whose
    key is the same for all heads.
    """

    query_rank: int | None  # None = queries are projected directly
    key_value_rank: int
    plain_size: int
    rope_size: int
    norm_epsilon: float  # of the norms of the latent states
    bias: bool  # of the projections down to the latent states


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer."""

    vocab_size: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int  # of queries and keys
    value_size: int  # of a head's values
    layers: tuple[LayerSpec, ...]  # in the order of the checkpoint
    norm: NormSpec
    pre_norms: bool  # norms before attention and before the MLP
    post_norms: bool  # norms after attention and after the MLP, before the residual is added
    parallel: bool  # attention and MLP both read the normed input, and both are added to it
    query_key_norm: str | None  # before rope: "head", of each head, "projection", of all heads as one, or None
    query_bias: bool  # of the query, key and value projections
    output_bias: bool  # of the attention output projection
    latent: LatentSpec | None
    sinks: bool  # each head has a score that takes a share of the softmax and gives nothing (GPT-OSS)
    attention_scale: float  # scores are q.k * attention_scale
    attention_soft_cap: float | None  # scores become cap * tanh(scores / cap)
    logit_soft_cap: float | None  # the same for the final logits
    logit_scale: float  # the final logits are multiplied by it, before the cap
    embedding_scale: float  # token embeddings are multiplied by it: 1 for Llama, sqrt(hidden size) for Gemma
    residual_scale: float  # what attention and MLP return is multiplied by it before it is added
    learned_positions: int | None  # rows of a table of position embeddings; None = no such table
    tied_head: bool  # the head is the transposed embedding
    initializer_range: float  # standard deviation of new weights

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and columns of the head; those from `vocab_size` on are zero and take no part."""
        return vocab_rows(self.vocab_size)


def vocab_rows(vocab_size: int) -> int:
    """Returns how many rows hold a vocabulary: as many as it has tokens, unless 32 does not divide them.

    Then they are rounded up to whole tiles of 128, so that they can be cut over devices. The size follows from the model
    alone, so a checkpoint fits every mesh, and models that most meshes divide have nothing beside their tokens.

    >>> vocab_rows(32000), vocab_rows(32064), vocab_rows(50257)
    (32000, 32064, 50304)
    """
    return vocab_size if vocab_size % 32 == 0 else -(-vocab_size // 128) * 128
