"""Settings that only some models or installations have a use for, refused before anything is loaded."""

import importlib.util

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.model.adapters import block_projections, kernel_values
from sft_jax.model.decoder import Decoder
from sft_jax.model.qat import ROUNDINGS
from sft_jax.model.spec import DecoderSpec, ExpertsSpec


def check_model_options(config: Config, spec: DecoderSpec) -> None:
    """Raises UserError for a key that does nothing for the model, or asks of it what it cannot do."""
    if not any(isinstance(layer.mlp, ExpertsSpec) for layer in spec.layers):
        for name in ("router_balance", "router_z"):
            if getattr(config.loss, name):
                raise UserError(f"loss.{name}: does nothing for {config.model.path}, which has no experts; leave it out.")
        if config.mesh.expert not in (1, -1):
            raise UserError(
                f"mesh.expert: {config.model.path} has no experts to cut; use mesh.fsdp, which cuts rows and parameters."
            )
    if spec.learned_positions is not None and config.data.max_length > spec.learned_positions:
        raise UserError(
            f"data.max_length: {config.data.max_length} tokens are more than the {spec.learned_positions} positions that "
            f"{config.model.path} has learned; lower it to {spec.learned_positions} or less."
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
