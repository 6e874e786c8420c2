"""What a run computes, before anything is loaded: its model in shapes and shardings, and what is trained of it.

The run and the planner compose here, so what is planned is what is run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flax import nnx

from sft_jax.checkpoint.processes import agree
from sft_jax.config import Config
from sft_jax.hf.load import abstract_decoder
from sft_jax.hf.source import Source
from sft_jax.model.adapters import AdapterPlan
from sft_jax.model.decoder import Decoder
from sft_jax.model.options import Options
from sft_jax.model.quantise import quantise
from sft_jax.model.sharding import AnyMesh, constrain_fn
from sft_jax.training.adapting import adapters_of, with_new_adapters
from sft_jax.training.model_checks import check_attention, check_model_options, check_remat, check_rounding
from sft_jax.training.optim import Optimizer, make_optimizer
from sft_jax.training.vocabulary import with_added_tokens


@dataclass(frozen=True)
class Composition:
    """The model of a run and its optimizer. Nothing has been loaded."""

    config: Config
    mesh: AnyMesh
    options: Options
    source: Source  # the base, with rows for `data.add_tokens`
    abstract: Decoder  # in shapes and shardings, with the run's adapters, quantised where that is asked for
    adapters: AdapterPlan | None

    def optimizer(self, total_steps: int) -> Optimizer:
        """Returns the optimizer of a run of `total_steps`. Raises UserError as `make_optimizer`."""
        return make_optimizer(
            self.config.optim, nnx.state(self.abstract), total_steps, seed=self.config.seed, adapters=self.adapters,
            lora_plus=self.config.adapter.lora_plus,
        )  # fmt: skip


def compose(config: Config, base: Source, mesh: AnyMesh, log: Callable[[str], None]) -> Composition:
    """Returns what the run of `config` on the model `base` computes on `mesh`, whose devices need not be there.

    Raises UserError for every setting that the model, the mesh or the optimizer refuses.
    """
    options = Options(
        compute_dtype=config.model.compute_dtype, precision=config.model.matmul_precision, remat=config.model.remat,
        attention=config.model.attention, neftune=config.train.neftune, qat=config.train.qat,
        exported_as=base.dtype or config.model.dtype, constrain=constrain_fn(mesh),
    )  # fmt: skip
    source = agree(lambda: with_added_tokens(config, base, log))
    abstract = abstract_decoder(source, options, mesh, config.model.dtype)
    if config.adapter.base_dtype:
        abstract = quantise(abstract, config.adapter.base_dtype)
    adapters = agree(lambda: adapters_of(config, abstract, base))
    composed = Composition(config, mesh, options, source, with_new_adapters(abstract, config, adapters), adapters)
    composed.optimizer(total_steps=2**31)  # raises for what it refuses
    check_model_options(config, composed.abstract.spec)
    check_attention(config, options, composed.abstract.spec)
    check_remat(options)
    check_rounding(config.train.qat, composed.abstract)
    return composed
