"""Settings that only some models have a use for, refused before anything is loaded."""

from sft_jax.config import Config
from sft_jax.errors import UserError
from sft_jax.model.spec import DecoderSpec, ExpertsSpec


def check_model_options(config: Config, spec: DecoderSpec) -> None:
    """Raises UserError for a key that does nothing for the model, or asks of it what it cannot do."""
    if not any(isinstance(layer.mlp, ExpertsSpec) for layer in spec.layers):
        for name in ("router_balance", "router_z"):
            if getattr(config.loss, name):
                raise UserError(f"loss.{name}: does nothing for {config.model.path}, which has no experts; leave it out.")
    if spec.learned_positions is not None and config.data.max_length > spec.learned_positions:
        raise UserError(
            f"data.max_length: {config.data.max_length} tokens are more than the {spec.learned_positions} positions that "
            f"{config.model.path} has learned; lower it to {spec.learned_positions} or less."
        )
