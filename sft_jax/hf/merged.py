"""A decoder as one of plain parameters, whatever it carries."""

from sft_jax.model.attach import merge
from sft_jax.model.decoder import Decoder


def plain(decoder: Decoder) -> Decoder:
    """Returns the decoder without adapters that computes the same: those that it carries are merged into its kernels."""
    return decoder if decoder.adapters is None else merge(decoder)
