"""Settings that only some models or installations have a use for, refused before anything is loaded."""

import importlib.util

import jax

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.model.adapters import block_projections, kernel_values
from sft_jax.model.attention import choose_kernel, platform_of
from sft_jax.model.context import context_parts
from sft_jax.model.decoder import Decoder
from sft_jax.model.mask import MaskSpec
from sft_jax.model.options import Options
from sft_jax.model.qat import ROUNDINGS
from sft_jax.model.spec import DecoderSpec, ExpertsSpec


def check_model_options(config: Config, spec: DecoderSpec) -> None:
    """Raises UserError for a key that does nothing for the model, or asks of it what it cannot do."""
    if not any(isinstance(layer.mlp, ExpertsSpec) for layer in spec.layers):
        for name in ("router_balance", "router_z"):
            if getattr(config.loss, name):
                raise UserError(f"loss.{name}: does nothing for {config.model.path}, which has no experts; leave it out.")
        if config.mesh.expert != 1:
            raise UserError(
                f"mesh.expert: {config.model.path} has no experts to cut; use mesh.fsdp, which cuts rows and parameters."
            )
    if spec.learned_positions is not None and config.data.max_length > spec.learned_positions:
        raise UserError(
            f"data.max_length: {config.data.max_length} tokens are more than the {spec.learned_positions} positions that "
            f"{config.model.path} has learned; lower it to {spec.learned_positions} or less."
        )


def check_attention(config: Config, options: Options, spec: DecoderSpec) -> None:
    """Raises UserError where model.attention names a kernel that cannot compute a layer of this model in these rows."""
    latent, length = spec.latent, config.data.max_length
    key_size = spec.head_size if latent is None else latent.plain_size + latent.rope_size
    kv_heads = spec.kv_heads if latent is None else spec.heads
    sizes = ((spec.heads, key_size), (kv_heads, key_size), (kv_heads, spec.value_size))
    q, k, v = (jax.ShapeDtypeStruct((1, length, *size), options.dtype) for size in sizes)
    for window in {layer.window for layer in spec.layers}:
        mask = MaskSpec(
            query_positions=None, key_positions=None, query_segments=None, key_segments=None, causal=True, window=window,
            scale=spec.attention_scale, soft_cap=spec.attention_soft_cap, parts=context_parts(options.mesh, length),
        )  # fmt: skip
        choose_kernel(
            options.attention, platform_of(options.mesh), q, k, v, mask, options.dot_precision, spec.sinks or None
        )


def check_remat(options: Options) -> None:
    """Raises UserError where model.remat would move states to the memory of the host from devices that have no other."""
    if options.remat == "offload" and platform_of(options.mesh) == "cpu":
        raise UserError(
            "model.remat: offload moves what the backward pass reads from a TPU's or GPU's memory to that of its host, and a CPU "
            "computes in the host's already; use full."
        )


def check_rounding(name: str, decoder: Decoder) -> None:
    """Raises UserError where kernels of `decoder`, which may be abstract, cannot be rounded as `train.qat` asks."""
    if not name:
        return
    found = importlib.util.find_spec("qwix")
    if found is None or found.origin is None:
        raise UserError("train.qat: the package qwix is not installed; run pip install 'sft_jax[qat]', or leave train.qat out.")
    group = ROUNDINGS[name].group
    for path, module in block_projections(decoder) if group else ():
        inputs = kernel_values(module).shape[-2]
        if inputs % group:
            whole = ", ".join(other for other, kind in ROUNDINGS.items() if kind.group is None)
            raise UserError(
                f"train.qat: {name} has a scale for {group} inputs, which do not divide the {inputs} of {path}; use {whole}."
            )
